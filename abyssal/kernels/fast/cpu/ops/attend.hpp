// Attention of one shared head of entries over the window and compressed blocks (abyssal/kernels/attention.py).
#pragma once

#include "ops/rows.hpp"
#include "ops/span.hpp"

namespace abyssal {

struct AttendArgs {
  std::int64_t sequences;
  const Span* spans;
  std::int64_t heads, dim, rotated;
  float* out;  // [tokens, heads, dim], turned back by the query's position

  const float* q;     // [tokens, heads, dim], as projected: each head is normalised and turned here
  const float* turn;  // [tokens, rotated / 2, 2] rotations of the tokens' positions
  const float* sink;  // [heads]
  float eps, scale;

  // the window: what the pass adds, and the ring of what was before, into which that is written in the end
  std::int64_t window, ring_size;
  Rows fresh, ring;
  bool kept;  // false: the ring stays as it is

  // compressed blocks: `ratio` tokens each (0: none), all that a token sees or those of `blocks`
  std::int64_t ratio;
  Rows entries;
  Pages pages;
  const std::int64_t* blocks;  // [tokens, k] in rising order, -1 in unused places; null: all
  std::int64_t k;
};

// Gradients of what `of` reads, all of it float32, from that of its result. Pages belong to one sequence each.
struct AttendBackwardArgs {
  AttendArgs of;      // out: the result
  const float* dout;  // [tokens, heads, dim]
  float* dq;          // [tokens, heads, dim]
  float* dsink;       // [heads]
  // as the arrays themselves, and zero before the call
  float* dfresh;
  float* dring;
  float* dentries;  // null without compressed blocks
};

}  // namespace abyssal
