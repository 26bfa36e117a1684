// Rows of bfloat16 against pairs of bfloat16, with AVX-512's product: twice as fast as float32, and the same bits,
// since it adds the second of a pair, then the first, each rounded once (check/linear.cpp holds the processor to it).
#pragma once

namespace abyssal::ABYSSAL_ISA {

// Pair k of a chunk, the first input in the lower half.
template <class F, int k>
inline __m512i pair_of(const typename F::Raw& raw) {
  if constexpr (F::format == Format::bfloat16) {
    return raw;
  } else if constexpr (F::format == Format::float8) {
    const __m512i first = _mm512_castps_si512(F::template value<2 * k>(raw).v);
    const __m512i second = _mm512_castps_si512(F::template value<2 * k + 1>(raw).v);
    return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);  // E4M3 fits into the upper half of float32
  } else {
    // 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; the permutation looks at five bits of each word of 16
    const __m512i half = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<short>(0x8000),
                          static_cast<short>(0xbf00), static_cast<short>(0xbf80), static_cast<short>(0xbfc0),
                          static_cast<short>(0xc000), static_cast<short>(0xc040), static_cast<short>(0xc080),
                          static_cast<short>(0xc0c0)));
    return _mm512_permutexvar_epi16(k == 0 ? raw : _mm512_srli_epi16(raw, 4 * k), half);
  }
}

// `add_chunk` of product.hpp, a pair in one step.
template <class F, int R, int G, int k>
inline void add_pairs(const typename F::Raw (&raw)[G], const std::uint16_t* const (&x)[R], std::int64_t at,
                      Lanes (&sums)[G][R]) {
  if constexpr (k < F::inputs / 2) {
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const auto pair = (__m512bh)pair_of<F, k>(raw[g]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        std::int32_t two;
        std::memcpy(&two, x[r] + at + g * group_inputs + 2 * k, sizeof two);
        sums[g][r].v = _mm512_dpbf16_ps(sums[g][r].v, pair, (__m512bh)_mm512_set1_epi32(two));
      }
    }
    add_pairs<F, R, G, k + 1>(raw, x, at, sums);
  }
}

template <class F_>
struct NarrowTile {
  using F = F_;
  using X = std::uint16_t;
  using Value = std::uint32_t;  // a pair
  static constexpr int size = group_inputs / 2 * lanes;
  static constexpr bool direct = F::format == Format::bfloat16;

  template <int k = 0>
  static void unpack_chunk(const typename F::Raw& raw, std::uint32_t* to) {
    if constexpr (k < F::inputs / 2) {
      _mm512_storeu_si512(to + k * lanes, pair_of<F, k>(raw));
      unpack_chunk<k + 1>(raw, to);
    }
  }
  static void unpack(const std::uint8_t* block, std::uint32_t* to) {
    for (int chunk = 0; chunk < group_inputs / F::inputs; ++chunk)
      unpack_chunk(F::load(block + chunk * F::bytes), to + chunk * F::inputs / 2 * lanes);
  }

  template <int R, int S>
  static void group(const std::uint32_t* values, std::int64_t stride, const std::uint16_t* x,
                    std::int64_t row_stride, Lanes (&sums)[R][S]) {
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) sums[r][s] = zeros();
#pragma GCC unroll 2
    for (int pair = 0; pair < group_inputs / 2; ++pair) {
      __m512bh value[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) value[s] = (__m512bh)_mm512_loadu_si512(values + s * stride + pair * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        std::int32_t two;
        std::memcpy(&two, x + r * row_stride + 2 * pair, sizeof two);
        const auto one = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sums[r][s].v = _mm512_dpbf16_ps(sums[r][s].v, value[s], one);
      }
    }
  }
};

}  // namespace abyssal::ABYSSAL_ISA
