// Rows to columns, sixteen by sixteen; nothing is computed, so all instruction sets agree.
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

#if ABYSSAL_ISA_avx512
// to[j * stride + i] = from[i][j] for 16 rows and 16 columns
inline void transpose(const float* const* from, std::int64_t column, float* to, std::int64_t stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from[i] + column);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      const __m512d x = _mm512_castps_pd(b[i + k]), y = _mm512_castps_pd(b[i + k + 2]);
      a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  // a[4 r + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 r .. 4 r + 3
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * stride, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(to + (c + 8) * stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(to + (c + 4) * stride, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(to + (c + 12) * stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
#elif ABYSSAL_ISA_avx2
inline void transpose_eight(const float* const* from, std::int64_t column, float* to, std::int64_t stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from[i] + column);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0x44);
      a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0xee);
    }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(to + (c + 4) * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}
inline void transpose(const float* const* from, std::int64_t column, float* to, std::int64_t stride) {
  for (int half = 0; half < 2; ++half)
    for (int side = 0; side < 2; ++side)
      transpose_eight(from + 8 * half, column + 8 * side, to + 8 * side * stride + 8 * half, stride);
}
#else
inline void transpose(const float* const* from, std::int64_t column, float* to, std::int64_t stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * stride + i] = from[i][column + j];
}
#endif

// The same for any number of columns.
inline void transpose_all(const float* const* from, std::int64_t columns, float* to, std::int64_t stride) {
  std::int64_t column = 0;
  for (; column + 16 <= columns; column += 16) transpose(from, column, to + column * stride, stride);
  for (; column < columns; ++column)
    for (int i = 0; i < 16; ++i) to[column * stride + i] = from[i][column];
}

}  // namespace abyssal::ABYSSAL_ISA
