// Products of two float32 matrices that lie row-major, for gradients: C = A B, or C = A^T B.
//
// The order of every sum is fixed: inner places in chunks; in a chunk from the first to the last, each by a fused
// multiply-add that starts at zero; then the chunk is added to the total. So neither the other rows and columns nor
// the way in which they are cut into tasks change a bit.
#pragma once

#include <cstring>

#include "vec/buffer.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

constexpr std::int64_t panel_columns = tile_strips * lanes;
constexpr std::int64_t chunk_inner = 128;  // a chunk of a panel stays in the first cache

// A is found at a[row * row_step + inner * inner_step]; one of the two steps is 1.
struct Outer {
  std::int64_t rows, columns, inner;
  const float* a;
  std::int64_t row_step, inner_step;
  const float* b;  // [inner, columns], b_stride values from row to row
  std::int64_t b_stride;
  float* c;  // [rows, columns]
  std::int64_t c_stride;
  bool added;  // to what C holds; else C is written
};

// R rows against V vectors of a packed panel.
template <int R, int V>
inline void outer_tile(const Outer& m, std::int64_t row, std::int64_t first, std::int64_t count, const float* panel,
                       std::int64_t column, bool added) {
  const float* a = m.a + row * m.row_step + first * m.inner_step;
  Lanes sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = zeros();
  for (std::int64_t k = 0; k < count; ++k) {
    Lanes value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load(panel + (k * V + v) * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes factor = all(a[r * m.row_step + k * m.inner_step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(value[v], factor, sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float* c = m.c + (row + r) * m.c_stride;
    for (int v = 0; v < V; ++v) {
      const std::int64_t at = column + v * lanes;
      store_at(c, at, m.columns, added ? add(load_at(c, at, m.columns), sums[r][v]) : sums[r][v]);
    }
  }
}

template <int V, int R = tile_rows>
inline void outer_rest(const Outer& m, std::int64_t row, int left, std::int64_t first, std::int64_t count,
                       const float* panel, std::int64_t column, bool added) {
  if constexpr (R > 1) {
    if (left < R) {
      outer_rest<V, R - 1>(m, row, left, first, count, panel, column, added);
      return;
    }
  }
  outer_tile<R, V>(m, row, first, count, panel, column, added);
}

// All rows against the V vectors of columns from `column` on.
template <int V = tile_strips>
inline void outer_panel(const Outer& m, std::int64_t column, int vectors) {
  if constexpr (V > 1) {
    if (vectors < V) {
      outer_panel<V - 1>(m, column, vectors);
      return;
    }
  }
  alignas(64) float panel[chunk_inner * V * lanes];
  if (m.inner == 0 && !m.added)
    for (std::int64_t row = 0; row < m.rows; ++row)
      for (int v = 0; v < V; ++v) store_at(m.c + row * m.c_stride, column + v * lanes, m.columns, zeros());
  for (std::int64_t first = 0; first < m.inner; first += chunk_inner) {
    const std::int64_t count = m.inner - first < chunk_inner ? m.inner - first : chunk_inner;
    for (std::int64_t k = 0; k < count; ++k)
      for (int v = 0; v < V; ++v)
        store(panel + (k * V + v) * lanes, load_at(m.b + (first + k) * m.b_stride, column + v * lanes, m.columns));
    const bool added = m.added || first > 0;
    std::int64_t row = 0;
    for (; row + tile_rows <= m.rows; row += tile_rows) outer_tile<tile_rows, V>(m, row, first, count, panel, column, added);
    if (row < m.rows) outer_rest<V>(m, row, static_cast<int>(m.rows - row), first, count, panel, column, added);
  }
}

}  // namespace abyssal::ABYSSAL_ISA
