// Gates of the residual streams: what `enter` and its way back share.
#pragma once

#include "ops/streams.hpp"
#include "vec/exp.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

constexpr std::int64_t block_tokens = lanes;  // of a task; as many matrices are normalised side by side
constexpr std::int64_t most_gates = (2 + most_streams) * most_streams;

// What fits into the registers: gates of one token; tokens and gates of a tile.
constexpr int row_gates = tile_strips == 4 ? 12 : 4, tile_tokens = tile_strips == 4 ? 4 : 2,
              tile_gates = tile_strips == 4 ? 6 : 2;

// Products of R tokens with G rows of fn: value i goes to lane i % 16, then the lanes are added.
template <int R, int G>
inline void products(const Site& a, const float* x, std::int64_t gate, float (*out)[most_gates]) {
  const std::int64_t width = a.streams * a.width;
  const float* fn = a.fn + gate * width;
  Lanes totals[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) totals[r][g] = zeros();
  std::int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    Lanes value[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) value[r] = load(x + r * width + i);
#pragma GCC unroll 12
    for (int g = 0; g < G; ++g) {
      const Lanes row = load(fn + g * width + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r][g] = fma(row, value[r], totals[r][g]);
    }
  }
  if (i < width)
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r)
        totals[r][g] = fma(load_at(fn + g * width, i, width), load_at(x + r * width, i, width), totals[r][g]);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) out[r][gate + g] = sum(totals[r][g]);
}

template <int R, int G>
inline void all_products(const Site& a, const float* x, std::int64_t gates, float (*out)[most_gates]) {
  std::int64_t gate = 0;
  for (; gate + G <= gates; gate += G) products<R, G>(a, x, gate, out);
  for (; gate < gates; ++gate) products<R, 1>(a, x, gate, out);
}

// Numbers that `normalise` keeps for the way back: the softmax, then of every step its factors and its result.
constexpr std::int64_t kept_of(std::int64_t n, std::int64_t iterations) {
  return n * n + (2 * iterations - 1) * (n + n * n);
}

// Softmax over each row, then column and row steps in turn; `mix` [streams * streams].
template <bool keep, class V>
inline void normalise(V* mix, int n, int iterations, V eps, V* kept = nullptr) {
  const V one = same<V>(1.0f);
  for (int j = 0; j < n; ++j) {
    V* row = mix + j * n;
    V most = row[0];
    for (int k = 1; k < n; ++k) most = larger(most, row[k]);
    for (int k = 0; k < n; ++k) row[k] = exp(sub(row[k], most));
    V total = row[0];
    for (int k = 1; k < n; ++k) total = add(total, row[k]);
    for (int k = 0; k < n; ++k) {
      const V share = div(row[k], total);
      if constexpr (keep) *kept++ = share;
      row[k] = add(share, eps);
    }
  }
  for (int step = 0; step < 2 * iterations - 1; ++step) {
    // one division for each sum; the quotient is a product, another rounding of half a unit
    const int across = step % 2 == 0 ? n : 1, along = step % 2 == 0 ? 1 : n;
    for (int line = 0; line < n; ++line) {
      V* first = mix + line * along;
      V total = first[0];
      for (int k = 1; k < n; ++k) total = add(total, first[k * across]);
      const V factor = div(one, add(total, eps));
      for (int k = 0; k < n; ++k) first[k * across] = mul(first[k * across], factor);
      if constexpr (keep) kept[line] = factor;
    }
    if constexpr (keep) {
      kept += n;
      for (int i = 0; i < n * n; ++i) *kept++ = mix[i];
    }
  }
}

// Projections of up to `block_tokens` tokens, and each token's inverse root mean square, by which they are multiplied.
inline void project(const Site& a, std::int64_t first, std::int64_t count, float (*values)[most_gates],
                    float* factors) {
  const std::int64_t width = a.streams * a.width, gates = a.gates();
  const float* x = a.x + first * width;
  std::int64_t token = 0;
  for (; token + tile_tokens <= count; token += tile_tokens)
    all_products<tile_tokens, tile_gates>(a, x + token * width, gates, values + token);
  for (; token < count; ++token) all_products<1, row_gates>(a, x + token * width, gates, values + token);
  for (token = 0; token < count; ++token) {
    factors[token] = inverse_rms(sum_of_squares(x + token * width, width), width, a.rms_eps);
    for (std::int64_t g = 0; g < gates; ++g) values[token][g] *= factors[token];
  }
}

// The weighted sum of a token's streams.
inline void weigh(const Site& a, std::int64_t token, const float* pre, float* y) {
  const float* x = a.x + token * a.streams * a.width;
  for (std::int64_t i = 0; i < a.width; i += lanes) {
    Lanes total = mul(load_at(x, i, a.width), all(pre[0]));
    for (std::int64_t j = 1; j < a.streams; ++j) total = fma(load_at(x + j * a.width, i, a.width), all(pre[j]), total);
    store_at(y, i, a.width, total);
  }
}

}  // namespace abyssal::ABYSSAL_ISA
