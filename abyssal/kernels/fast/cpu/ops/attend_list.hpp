// What a query reads, and the query itself, for attention and its way back.
#pragma once

#include "ops/attend.hpp"
#include "ops/unpack_row.hpp"
#include "vec/sums.hpp"
#include "vec/turn.hpp"

namespace abyssal::ABYSSAL_ISA {

// Where the entries of a query lie.
struct List {
  const AttendArgs& a;
  const Span& span;
  std::int64_t sequence, token, position, oldest, near, far;

  List(const AttendArgs& args, std::int64_t g, std::int64_t t)
      : a(args), span(args.spans[g]), sequence(g), token(t), position(span.start + t - span.first) {
    const std::int64_t present = span.since < span.start ? span.since : span.start;
    oldest = position - a.window + 1 > present ? position - a.window + 1 : present;
    if (oldest < 0) oldest = 0;
    near = position - oldest + 1;
    far = 0;
    if (a.ratio == 0) return;
    if (a.blocks == nullptr) far = (position + 1) / a.ratio;
    else
      while (far < a.k && a.blocks[token * a.k + far] >= 0) ++far;
  }
  std::int64_t count() const { return near + far; }

  const float* row(std::int64_t i, float* space) const {
    if (i < near) {
      const std::int64_t p = oldest + i;
      if (p >= span.start) return row_of(a.fresh, span.first + p - span.start, space);
      return row_of(a.ring, span.slot * a.ring_size + p % a.ring_size, space);
    }
    return row_of(a.entries, row_of_block(a.pages, sequence, block(i)), space);
  }
  // the block of an entry behind the window
  std::int64_t block(std::int64_t i) const {
    return a.blocks == nullptr ? i - near : a.blocks[token * a.k + i - near];
  }
};

// Normalised, turned and scaled queries of some heads, filled with zeros to `stride`.
inline void prepare(const AttendArgs& a, std::int64_t token, std::int64_t head, std::int64_t heads, std::int64_t stride,
                    float* to) {
  const std::int64_t plain = a.dim - a.rotated;
  const float* turn = a.turn + token * a.rotated;
  for (std::int64_t h = 0; h < heads; ++h, to += stride) {
    const float* q = a.q + (token * a.heads + head + h) * a.dim;
    for (std::int64_t c = 0; c < stride; ++c) to[c] = c < a.dim ? q[c] : 0.0f;
    Lanes squares = zeros();
    for (std::int64_t c = 0; c < stride; c += lanes) squares = fma(load(to + c), load(to + c), squares);
    const float mean = sum(squares) / static_cast<float>(a.dim) + a.eps;
    const float factor = 1.0f / __builtin_sqrtf(mean);
    for (std::int64_t c = 0; c < a.dim; ++c) to[c] = to[c] * factor;
    turn_pairs<false>(to + plain, turn, a.rotated / 2);
    for (std::int64_t c = 0; c < a.dim; ++c) to[c] = to[c] * a.scale;
  }
}

}  // namespace abyssal::ABYSSAL_ISA
