// Products of rows with blocks of a weight, for all kernels that multiply.
//
// The order of every output's sum is fixed: inputs in groups of 32; in a group, pairs from the first to the last,
// of a pair the second input first, each by a fused multiply-add that begins at zero; then the group's sum, times
// its scale, is added to the total in one more. It is the order of the processor's bfloat16 product, and since
// scales are powers of two, a quantised weight gives the same bits as its values in float32.
//
// There are two ways through it: `few` takes values out of registers as they are unpacked, for a few rows; a tile
// reads values that were unpacked before, for many rows.
#pragma once

#include "ops/weight.hpp"
#include "vec/codes.hpp"

namespace abyssal::ABYSSAL_ISA {

// Bytes between what is read and what is fetched for later. Groups side by side are read in turns, which the
// processor's own prefetcher does not see through; a third of the memory's rate was lost without.
constexpr int look_ahead = 4096;

template <class F>
constexpr bool scaled = F::format == Format::float8 || F::format == Format::float4;

template <class F>
inline const std::uint8_t* block_of(const Weight& w, std::int64_t strip, std::int64_t group) {
  return w.data + (strip * w.groups() + group) * block_bytes(F::format);
}

// The scales of the sixteen outputs of a strip, in a group.
template <class F>
inline Lanes scales_at(const Weight& w, std::int64_t strip, std::int64_t group) {
  if constexpr (F::format == Format::float4) return load_scales(w.scales + (strip * w.groups() + group) * lanes);
  else return all(w.tile_scales[strip * lanes / tile_side * w.tiles_across() + group * group_inputs / tile_side]);
}

// The total with one more group; the unit is apart, because its product with a scale could leave float32's range.
template <class F>
inline Lanes fold(Lanes total, Lanes sum_of_group, Lanes scale) {
  if constexpr (F::unit != 1.0f) sum_of_group = mul(sum_of_group, all(F::unit));
  return fma(sum_of_group, scale, total);
}

// The inputs of a chunk of G groups, pair by pair, the second of a pair first. Groups take turns, since each sum
// waits for its own last step.
template <class F, int R, int G, int k = 0>
inline void add_chunk(const typename F::Raw (&raw)[G], const float* const (&x)[R], std::int64_t at,
                      Lanes (&sums)[G][R]) {
  if constexpr (k < F::inputs) {
    constexpr int input = k ^ 1;
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Lanes value = F::template value<input>(raw[g]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[g][r] = fma(value, all(x[r][at + g * group_inputs + input]), sums[g][r]);
    }
    add_chunk<F, R, G, k + 1>(raw, x, at, sums);
  }
}

#if ABYSSAL_ISA_avx512
template <class F, int R, int G, int k = 0>
inline void add_pairs(const typename F::Raw (&raw)[G], const std::uint16_t* const (&x)[R], std::int64_t at,
               Lanes (&sums)[G][R]);
#endif

// G groups side by side.
template <class F, int R, int G, class X>
inline void few_groups(const Weight& w, std::int64_t strip, std::int64_t group, const X* const (&x)[R],
                       Lanes (&totals)[R]) {
  Lanes sums[G][R];
  for (int g = 0; g < G; ++g)
    for (int r = 0; r < R; ++r) sums[g][r] = zeros();
  const std::uint8_t* block = block_of<F>(w, strip, group);
  if constexpr (F::format == Format::float4)
    for (int g = 0; g < G; g += 4) __builtin_prefetch(w.scales + (strip * w.groups() + group + g) * lanes + 1024);
  for (int chunk = 0; chunk < group_inputs / F::inputs; ++chunk) {
    typename F::Raw raw[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const std::uint8_t* from = block + g * block_bytes(F::format) + chunk * F::bytes;
      raw[g] = F::load(from);
      for (int line = 0; line < F::bytes; line += 64) __builtin_prefetch(from + line + look_ahead);
    }
    const std::int64_t at = group * group_inputs + chunk * F::inputs;
    if constexpr (sizeof(X) == sizeof(float)) add_chunk<F, R, G>(raw, x, at, sums);
    else add_pairs<F, R, G>(raw, x, at, sums);
  }
  for (int g = 0; g < G; ++g) {
    if constexpr (scaled<F>) {
      const Lanes scale = scales_at<F>(w, strip, group + g);
      for (int r = 0; r < R; ++r) totals[r] = fold<F>(totals[r], sums[g][r], scale);
    } else {
      for (int r = 0; r < R; ++r) totals[r] = add(totals[r], sums[g][r]);
    }
  }
}

// What leaves room for values and rows in the registers.
template <class F, int R>
constexpr int few_side_by_side = F::side_by_side >= (1 << R / 2) ? F::side_by_side >> R / 2 : 1;

// R rows, of float32 or bfloat16, against one strip; rows are filled with zeros to whole groups.
template <class F, int R, class X>
inline void few(const Weight& w, std::int64_t strip, const X* const (&x)[R], Lanes (&totals)[R]) {
  constexpr int G = few_side_by_side<F, R>;
  const std::int64_t groups = w.groups();
  for (int r = 0; r < R; ++r) totals[r] = zeros();
  std::int64_t group = 0;
  for (; group + G <= groups; group += G) few_groups<F, R, G>(w, strip, group, x, totals);
  for (; group < groups; ++group) few_groups<F, R, 1>(w, strip, group, x, totals);
}

// Rows of float32 against values in float32, [32 inputs][16 lanes] for a strip and a group.
template <class F_>
struct WideTile {
  using F = F_;
  using X = float;
  using Value = float;
  static constexpr int size = group_inputs * lanes;              // values of a strip and a group
  static constexpr bool direct = F::format == Format::float32;  // blocks hold just these values

  template <int k = 0>
  static void unpack_chunk(const typename F::Raw& raw, float* to) {
    if constexpr (k < F::inputs) {
      store(to + k * lanes, F::template value<k>(raw));
      unpack_chunk<k + 1>(raw, to);
    }
  }
  static void unpack(const std::uint8_t* block, float* to) {
    for (int chunk = 0; chunk < group_inputs / F::inputs; ++chunk)
      unpack_chunk(F::load(block + chunk * F::bytes), to + chunk * F::inputs * lanes);
  }

  // R rows against S strips, `stride` values from strip to strip.
  template <int R, int S>
  static void group(const float* values, std::int64_t stride, const float* x, std::int64_t row_stride,
                    Lanes (&sums)[R][S]) {
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) sums[r][s] = zeros();
    for (int i = 0; i < group_inputs; i += 2) {
#pragma GCC unroll 2
      for (int j = 1; j >= 0; --j) {
        Lanes value[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) value[s] = load(values + s * stride + (i + j) * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Lanes one = all(x[r * row_stride + i + j]);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) sums[r][s] = fma(value[s], one, sums[r][s]);
        }
      }
    }
  }
};

}  // namespace abyssal::ABYSSAL_ISA

#if ABYSSAL_ISA_avx512
#include "ops/product_bfloat16.hpp"
#endif
