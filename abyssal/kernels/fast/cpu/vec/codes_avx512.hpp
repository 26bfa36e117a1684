#pragma once

namespace abyssal::ABYSSAL_ISA {

// One load: the compiler would else put it into each instruction that uses the value.
inline __m512i load_once(const std::uint8_t* from) {
  __m512i bytes = _mm512_loadu_si512(from);
  asm("" : "+v"(bytes));
  return bytes;
}

struct Bfloat16 {
  static constexpr Format format = Format::bfloat16;
  static constexpr int inputs = 2, bytes = 64;
  static constexpr int side_by_side = 8;
  static constexpr float unit = 1.0f;
  using Raw = __m512i;
  static Raw load(const std::uint8_t* from) { return load_once(from); }
  template <int k>
  static Lanes value(Raw raw) {
    if constexpr (k == 0) return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16))};
    else return {_mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }
};

// E4M3 bits, moved by one, are those of a half 2^8 times smaller; subnormal numbers too.
struct Float8 {
  static constexpr Format format = Format::float8;
  static constexpr int inputs = 4, bytes = 64;
  static constexpr int side_by_side = 8;
  static constexpr float unit = 256.0f;
  struct Raw {
    __m512i byte[2];
  };
  static Raw load(const std::uint8_t* from) {
    const __m512i words = load_once(from);
    const __m512i mask = _mm512_set1_epi16(static_cast<short>(0xbf80));
    return {{_mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(words, 8), 1), mask),
             _mm512_and_si512(_mm512_srai_epi16(words, 1), mask)}};
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    if constexpr (k % 2 == 0) return {_mm512_cvtph_ps(_mm512_castsi512_si256(raw.byte[k / 2]))};
    else return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw.byte[k / 2], 1))};
  }
};

// The permutation looks at the lowest four bits of each lane: a table of sixteen numbers.
struct Float4 {
  static constexpr Format format = Format::float4;
  static constexpr int inputs = 8, bytes = 64;
  static constexpr int side_by_side = 8;
  static constexpr float unit = 1.0f;
  using Raw = __m512i;
  static Raw load(const std::uint8_t* from) { return load_once(from); }
  template <int k>
  static Lanes value(Raw raw) {
    const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f,
                                        -2.0f, -3.0f, -4.0f, -6.0f);
    constexpr int nibble = k / 2 + k % 2 * 4;
    return {_mm512_permutexvar_ps(nibble == 0 ? raw : _mm512_srli_epi32(raw, nibble * 4), table)};
  }
};

// Scales 2^(byte - 127) of sixteen outputs; 255 is NaN.
inline Lanes load_scales(const std::uint8_t* from) {
  const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  __m512i bits = _mm512_slli_epi32(byte, 23);
  bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(byte, byte), _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255));
  return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)))};
}

}  // namespace abyssal::ABYSSAL_ISA
