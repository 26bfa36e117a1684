// A stored vector of the cache as float32.
#pragma once

#include "ops/rows.hpp"
#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

inline float power_of_byte(std::uint8_t byte) {
  const std::uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : std::uint32_t{byte} << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// E4M3; bits that are moved by one are those of a half 2^8 times smaller.
inline float value_of_e4m3(std::uint8_t byte) {
  const std::uint32_t magnitude = byte & 0x7f;
  std::uint32_t bits = (magnitude << 20) + (120u << 23);
  float value;
  if (magnitude == 0x7f) bits = 0x7fc00000u;
  std::memcpy(&value, &bits, sizeof value);
  if (magnitude < 8) value = static_cast<float>(magnitude) * 0x1p-9f;
  return byte & 0x80 ? -value : value;
}

#if ABYSSAL_ISA_avx512
inline Lanes sixteen_e4m3(const std::uint8_t* from) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 1);
  const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16(static_cast<short>(0xbf80)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(words, _mm256_set1_epi16(0x7f)),
                                                _mm256_set1_epi16(0x7f));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  return {_mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")))};
}
#elif ABYSSAL_ISA_avx2
inline __m256 eight_e4m3(const std::uint8_t* from) {
  const __m128i words = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i moved = _mm_srai_epi16(_mm_slli_epi16(words, 8), 1);
  const __m128i half = _mm_and_si128(moved, _mm_set1_epi16(static_cast<short>(0xbf80)));
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(words, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
  const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(nan)));
}
inline Lanes sixteen_e4m3(const std::uint8_t* from) { return {eight_e4m3(from), eight_e4m3(from + 8)}; }
#else
inline Lanes sixteen_e4m3(const std::uint8_t* from) {
  float values[lanes];
  for (int i = 0; i < lanes; ++i) values[i] = value_of_e4m3(from[i]);
  return load(values);
}
#endif

// abyssal.quant.entry.unpack_entry
inline void unpack_entry(const std::uint8_t* from, std::int64_t dim, std::int64_t rotated, float* to) {
  const std::int64_t plain = dim - rotated;
  const std::uint8_t* scales = from + plain + 2 * rotated;
  for (std::int64_t first = 0; first < plain; first += 64) {
    const float scale = power_of_byte(scales[first / 64]);
    const std::int64_t stop = first + 64 < plain ? first + 64 : plain;
    std::int64_t i = first;
    for (; i + lanes <= stop; i += lanes) store(to + i, mul(sixteen_e4m3(from + i), all(scale)));
    for (; i < stop; ++i) to[i] = value_of_e4m3(from[i]) * scale;
  }
  for (std::int64_t i = 0; i < rotated; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + plain + 2 * i, sizeof bits);
    to[plain + i] = from_bfloat16(bits);
  }
}

// abyssal.quant.entry.unpack_index_key
inline void unpack_key(const std::uint8_t* from, std::int64_t dim, float* to) {
  static const float table[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  const std::uint8_t* scales = from + dim / 2;
  std::int64_t first = 0;
#if ABYSSAL_ISA_avx512
  const __m512 values = _mm512_loadu_ps(table);
  for (; first + 32 <= dim; first += 32) {
    const __m512 scale = _mm512_set1_ps(power_of_byte(scales[first / 32]));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + first / 2));
    // byte k in the even lane and in the odd one, whose nibble is moved down
    const __m128i high = _mm_srli_epi16(bytes, 4);
    const __m512i low16 = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, high));
    const __m512i high16 = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(bytes, high));
    _mm512_storeu_ps(to + first, _mm512_mul_ps(_mm512_permutexvar_ps(low16, values), scale));
    _mm512_storeu_ps(to + first + 16, _mm512_mul_ps(_mm512_permutexvar_ps(high16, values), scale));
  }
#endif
  for (; first < dim; first += 32) {
    const float scale = power_of_byte(scales[first / 32]);
    for (std::int64_t i = first; i < first + 32 && i < dim; ++i)
      to[i] = table[(from[i / 2] >> (i % 2 * 4)) & 15] * scale;
  }
}

inline std::int64_t row_of_block(const Pages& pages, std::int64_t sequence, std::int64_t block) {
  return 1 + pages.tables[sequence * pages.most + block / pages.per_page] * pages.per_page + block % pages.per_page;
}

// The values of a row; `space` holds `dim` values and is used where the row does not lie as float32.
inline const float* row_of(const Rows& rows, std::int64_t row, float* space) {
  const std::uint8_t* from = rows.data + row * rows.bytes;
  switch (rows.stored) {
    case Stored::float32: return reinterpret_cast<const float*>(from);
    case Stored::bfloat16: {
      const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
      for (std::int64_t i = 0; i < rows.dim; ++i) space[i] = from_bfloat16(halves[i]);
      return space;
    }
    case Stored::entry: unpack_entry(from, rows.dim, rows.rotated, space); return space;
    default: unpack_key(from, rows.dim, space); return space;
  }
}

}  // namespace abyssal::ABYSSAL_ISA
