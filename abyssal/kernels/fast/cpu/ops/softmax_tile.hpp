// A softmax over entries that goes by in tiles: the state of some heads of one query.
#pragma once

#include "vec/buffer.hpp"
#include "vec/falling.hpp"
#include "vec/transpose.hpp"

namespace abyssal::ABYSSAL_ISA {

#if ABYSSAL_ISA_avx512
constexpr int heads_at_once = 4, vectors_at_once = 4;
#else
constexpr int heads_at_once = 2, vectors_at_once = 2;
#endif
constexpr int tile_entries = 64;
constexpr int tile_vectors = tile_entries / lanes;
constexpr std::int64_t tile_columns = 64;  // of all entries, which stay in the first cache while the heads go by

// Entries of a tile: their rows, filled with zeros to `stride` values, and the same with entries in lanes.
struct Tile {
  std::int64_t stride;
  int here;
  const float* rows[tile_entries];
  Buffer<float> columns, space;
  Buffer<float> weights;  // [heads, entries]: logits at first
  Buffer<float> fades;    // [heads]

  Tile(std::int64_t width, std::int64_t heads)
      : stride(width), here(0), columns(width * tile_entries), space((width + lanes) * tile_entries),
        weights(heads * tile_entries), fades(heads) {}

  // Where entry i may lie; a power of two between entries would put them all into the same places of the cache.
  float* space_of(int i) { return &space[i * (stride + lanes)]; }

  void turn() {
    const float* padded[tile_entries];
    for (int i = 0; i < tile_entries; ++i) padded[i] = rows[i < here ? i : here - 1];
    for (int v = 0; v < (here + lanes - 1) / lanes; ++v)
      transpose_all(padded + v * lanes, stride, &columns[v * lanes], tile_entries);
  }
};

struct State {
  float* largest;  // [heads]
  float* total;    // [heads]
  float* out;      // [heads, stride]
  static std::int64_t size(std::int64_t heads, std::int64_t stride) { return heads * (stride + 2); }
  static State at(float* memory, std::int64_t heads) { return {memory, memory + heads, memory + 2 * heads}; }

  // That of the heads from one on.
  State from(std::int64_t head, std::int64_t stride) const {
    return {largest + head, total + head, out + head * stride};
  }

  void clear(const float* sink, std::int64_t heads, std::int64_t stride) const {
    for (std::int64_t h = 0; h < heads; ++h) {
      largest[h] = sink[h];  // never below the sink, so that its share cannot overflow
      total[h] = 0.0f;
    }
    for (std::int64_t i = 0; i < heads * stride; ++i) out[i] = 0.0f;
  }
};

// Products of R queries with V vectors of entries, dimension after dimension; those from `first` to `stop` are added.
template <int R, int V>
inline void products(const float* q, const Tile& tile, std::int64_t first, std::int64_t stop, int vector,
                     float* logits) {
  Lanes sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = first == 0 ? zeros() : load(logits + r * tile_entries + (vector + v) * lanes);
  const float* columns = &tile.columns[vector * lanes];
  for (std::int64_t c = first; c < stop; ++c) {
    Lanes key[V];
    for (int v = 0; v < V; ++v) key[v] = load(columns + c * tile_entries + v * lanes);
    for (int r = 0; r < R; ++r) {
      const Lanes factor = all(q[r * tile.stride + c]);
      for (int v = 0; v < V; ++v) sums[r][v] = fma(factor, key[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(logits + r * tile_entries + (vector + v) * lanes, sums[r][v]);
}

// R rows of `out` times their fade, plus the weighted entries, one entry after another.
template <int R, int V>
inline void mix(const Tile& tile, const float* weights, const float* fades, std::int64_t column, float* out) {
  Lanes sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = mul(load(out + r * tile.stride + column + v * lanes), all(fades[r]));
  for (int k = 0; k < tile.here; ++k) {
    Lanes value[V];
    for (int v = 0; v < V; ++v) value[v] = load(tile.rows[k] + column + v * lanes);
    for (int r = 0; r < R; ++r) {
      const Lanes weight = all(weights[r * tile_entries + k]);
      for (int v = 0; v < V; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * tile.stride + column + v * lanes, sums[r][v]);
}

template <int R>
inline void products_of(const float* q, Tile& tile, std::int64_t first, std::int64_t stop, std::int64_t head) {
  const int used = (tile.here + lanes - 1) / lanes;
  float* logits = &tile.weights[head * tile_entries];
  int vector = 0;
  for (; vector + vectors_at_once <= used; vector += vectors_at_once)
    products<R, vectors_at_once>(q + head * tile.stride, tile, first, stop, vector, logits);
  for (; vector < used; ++vector) products<R, 1>(q + head * tile.stride, tile, first, stop, vector, logits);
}

// Logits of a head become weights.
inline void weigh(Tile& tile, const State& state, std::int64_t head) {
  float* row = &tile.weights[head * tile_entries];
  for (int k = tile.here; k < tile_entries; ++k) row[k] = -__builtin_inff();
  Lanes most = load(row);
  for (int v = 1; v < tile_vectors; ++v) most = larger(most, load(row + v * lanes));
  const float seen = largest(most), before = state.largest[head];
  const float now = before > seen ? before : seen;
  Lanes sums = zeros();
  for (int v = 0; v < tile_vectors; ++v) {
    const Lanes weight = exp_falling(sub(load(row + v * lanes), all(now)));
    store(row + v * lanes, weight);
    sums = add(sums, weight);
  }
  tile.fades[head] = exp_falling(before - now);
  state.largest[head] = now;
  state.total[head] = state.total[head] * tile.fades[head] + sum(sums);
}

template <int R>
inline void mix_of(const Tile& tile, const State& state, std::int64_t first, std::int64_t stop, std::int64_t head) {
  const float* weights = &tile.weights[head * tile_entries];
  float* out = state.out + head * tile.stride;
  std::int64_t column = first;
  for (; column + vectors_at_once * lanes <= stop; column += vectors_at_once * lanes)
    mix<R, vectors_at_once>(tile, weights, &tile.fades[head], column, out);
  for (; column < stop; column += lanes) mix<R, 1>(tile, weights, &tile.fades[head], column, out);
}

// Read a tile; `q [heads, stride]`.
inline void read_tile(const float* q, Tile& tile, const State& state, std::int64_t heads) {
  for (std::int64_t first = 0; first < tile.stride; first += tile_columns) {
    const std::int64_t stop = first + tile_columns < tile.stride ? first + tile_columns : tile.stride;
    std::int64_t h = 0;
    for (; h + heads_at_once <= heads; h += heads_at_once) products_of<heads_at_once>(q, tile, first, stop, h);
    for (; h < heads; ++h) products_of<1>(q, tile, first, stop, h);
  }
  for (std::int64_t h = 0; h < heads; ++h) weigh(tile, state, h);
  for (std::int64_t first = 0; first < tile.stride; first += tile_columns) {
    const std::int64_t stop = first + tile_columns < tile.stride ? first + tile_columns : tile.stride;
    std::int64_t h = 0;
    for (; h + heads_at_once <= heads; h += heads_at_once) mix_of<heads_at_once>(tile, state, first, stop, h);
    for (; h < heads; ++h) mix_of<1>(tile, state, first, stop, h);
  }
}

// What was read later joins what was read before.
inline void join(const State& state, const State& later, std::int64_t heads, std::int64_t stride) {
  for (std::int64_t h = 0; h < heads; ++h) {
    const float before = state.largest[h], seen = later.largest[h], now = before > seen ? before : seen;
    const float fade = exp_falling(before - now), share = exp_falling(seen - now);
    state.largest[h] = now;
    state.total[h] = state.total[h] * fade + later.total[h] * share;
    for (std::int64_t c = 0; c < stride; c += lanes) {
      float* out = state.out + h * stride + c;
      store(out, fma(load(later.out + h * stride + c), all(share), mul(load(out), all(fade))));
    }
  }
}

}  // namespace abyssal::ABYSSAL_ISA
