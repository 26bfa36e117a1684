// Many rows against a few strips: values are unpacked a chunk at a time, and all rows pass over them in tiles.
#pragma once

#include <cstring>

#include "ops/product.hpp"

namespace abyssal::ABYSSAL_ISA {

constexpr std::int64_t block_rows = 192;  // rows whose totals are held while the weight goes by
constexpr int chunk_groups = 8;           // groups that are unpacked at once

template <class Tile>
class Many {
 public:
  using F = typename Tile::F;
  using X = typename Tile::X;
  using Value = typename Tile::Value;

  // a constructor, so that the arrays are not cleared
  Many(const Weight& weight, std::int64_t strip, const X* x, std::int64_t stride, std::int64_t rows)
      : w_(weight), strip_(strip), x_(x), stride_(stride), rows_(rows) {}

  template <int S = tile_strips>
  void run(int strips) {
    if constexpr (S > 1) {
      if (strips < S) {
        run<S - 1>(strips);
        return;
      }
    }
    std::memset(totals_, 0, sizeof totals_[0] * static_cast<std::size_t>(rows_));
    for (std::int64_t group = 0; group < w_.groups(); group += chunk_groups) {
      const int count = static_cast<int>(w_.groups() - group < chunk_groups ? w_.groups() - group : chunk_groups);
      const Value* values = values_[0];
      std::int64_t step = chunk_groups * Tile::size + 16 * 1;
      if constexpr (Tile::direct) {
        values = reinterpret_cast<const Value*>(block_of<F>(w_, strip_, group));
        step = w_.groups() * Tile::size;
      } else {
        for (int s = 0; s < S; ++s)
          for (int g = 0; g < count; ++g) {
            const std::uint8_t* block = block_of<F>(w_, strip_ + s, group + g);
            for (int line = 0; line < block_bytes(F::format); line += 64)
              __builtin_prefetch(block + line + chunk_groups * block_bytes(F::format));  // the next chunk
            Tile::unpack(block, values_[s] + g * Tile::size);
          }
      }
      if constexpr (scaled<F>)
        for (int s = 0; s < S; ++s)
          for (int g = 0; g < count; ++g) store(scales_[g][s], scales_at<F>(w_, strip_ + s, group + g));
      std::int64_t row = 0;
      for (; row + tile_rows <= rows_; row += tile_rows) rows_at<tile_rows, S>(row, group, count, values, step);
      if (row < rows_) rest<S>(row, static_cast<int>(rows_ - row), group, count, values, step);
    }
  }

  const float* totals(std::int64_t row, int s) const { return totals_[row][s]; }

 private:
  template <int R, int S>
  void rows_at(std::int64_t row, std::int64_t group, int count, const Value* values, std::int64_t step) {
    for (int g = 0; g < count; ++g) {
      Lanes sums[R][S];
      Tile::template group<R, S>(values + g * Tile::size, step, x_ + row * stride_ + (group + g) * group_inputs, stride_,
                                 sums);
      asm volatile("" : : : "memory");  // scales are loaded here, not before the sums fill the registers
      Lanes scale[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) scale[s] = scaled<F> ? load(scales_[g][s]) : zeros();
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          float* total = totals_[row + r][s];
          if constexpr (scaled<F>) store(total, fold<F>(load(total), sums[r][s], scale[s]));
          else store(total, add(load(total), sums[r][s]));
        }
    }
  }

  template <int S, int R = tile_rows>
  void rest(std::int64_t row, int left, std::int64_t group, int count, const Value* values, std::int64_t step) {
    if constexpr (R > 1) {
      if (left < R) {
        rest<S, R - 1>(row, left, group, count, values, step);
        return;
      }
    }
    rows_at<R, S>(row, group, count, values, step);
  }

  const Weight& w_;
  std::int64_t strip_;
  const X* x_;
  std::int64_t stride_, rows_;
  alignas(64) float totals_[block_rows][tile_strips][lanes];
  alignas(64) float scales_[chunk_groups][tile_strips][lanes];
  alignas(64) Value values_[tile_strips][chunk_groups * Tile::size + 16 * 1];
};

// Call put(row, strip, result) for all rows and `strips` strips (at most tile_strips) from `strip` on.
template <class Tile, class Put>
inline void many(const Weight& w, std::int64_t strip, int strips, const typename Tile::X* x, std::int64_t stride,
                 std::int64_t rows, const Put& put) {
  for (std::int64_t row = 0; row < rows; row += block_rows) {
    const std::int64_t here = rows - row < block_rows ? rows - row : block_rows;
    Many<Tile> work(w, strip, x + row * stride, stride, here);
    work.run(strips);
    for (std::int64_t r = 0; r < here; ++r)
      for (int s = 0; s < strips; ++s) put(row + r, s, load(work.totals(r, s)));
  }
}

}  // namespace abyssal::ABYSSAL_ISA
