#pragma once

namespace abyssal::ABYSSAL_ISA {

struct Bfloat16 {
  static constexpr Format format = Format::bfloat16;
  static constexpr int inputs = 2, bytes = 64;
  static constexpr int side_by_side = 4;
  static constexpr float unit = 1.0f;
  struct Raw {
    __m256i lo, hi;
  };
  static Raw load(const std::uint8_t* from) {
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  template <int k>
  static __m256 one(__m256i x) {
    if constexpr (k == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    else return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    return {one<k>(raw.lo), one<k>(raw.hi)};
  }
};

// E4M3 bits, moved by one, are those of a half 2^8 times smaller; subnormal numbers too.
struct Float8 {
  static constexpr Format format = Format::float8;
  static constexpr int inputs = 4, bytes = 64;
  static constexpr int side_by_side = 4;
  static constexpr float unit = 256.0f;
  struct Raw {
    __m256i half[2];
  };
  static Raw load(const std::uint8_t* from) {
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    const __m256i words = raw.half[k % 2];
    const __m256i bits = _mm256_and_si256(_mm256_srai_epi16(k < 2 ? _mm256_slli_epi16(words, 8) : words, 1),
                                          _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
  }
};

// Two tables of bytes give the lower and the upper byte of a bfloat16; they are joined and brought back into lanes.
struct Float4 {
  static constexpr Format format = Format::float4;
  static constexpr int inputs = 8, bytes = 64;
  static constexpr int side_by_side = 4;
  static constexpr float unit = 1.0f;
  struct Raw {
    // eight lanes each; words of 32 bits hold inputs (0, 4), (1, 5), (2, 6), (3, 7), the first in the lower half
    __m256i pairs[4][2];
  };
  static Raw load(const std::uint8_t* from) {
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64));
    const __m256i mask = _mm256_set1_epi8(15);
    const auto* halves = reinterpret_cast<const __m256i*>(from);
    Raw raw;
    for (int half = 0; half < 2; ++half) {
      const __m256i x = _mm256_loadu_si256(halves + half);
      for (int nibble = 0; nibble < 2; ++nibble) {
        const __m256i codes = _mm256_and_si256(nibble == 0 ? x : _mm256_srli_epi16(x, 4), mask);
        const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
        const __m256 a = _mm256_castsi256_ps(_mm256_unpacklo_epi8(l, h));  // lanes 0, 1, 4, 5
        const __m256 b = _mm256_castsi256_ps(_mm256_unpackhi_epi8(l, h));  // lanes 2, 3, 6, 7
        raw.pairs[2 * nibble][half] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
        raw.pairs[2 * nibble + 1][half] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
      }
    }
    return raw;
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    const __m256i* x = raw.pairs[k % 4];
    return {Bfloat16::one<k / 4>(x[0]), Bfloat16::one<k / 4>(x[1])};
  }
};

inline __m256 scales_of(__m256i byte) {
  __m256i bits = _mm256_slli_epi32(byte, 23);
  const __m256i smallest = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
  const __m256i nan = _mm256_cmpeq_epi32(byte, _mm256_set1_epi32(255));
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x00400000), smallest);
  return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), nan));
}

// Scales 2^(byte - 127) of sixteen outputs; 255 is NaN.
inline Lanes load_scales(const std::uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {scales_of(_mm256_cvtepu8_epi32(bytes)), scales_of(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

}  // namespace abyssal::ABYSSAL_ISA
