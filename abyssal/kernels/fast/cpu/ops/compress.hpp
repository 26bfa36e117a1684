// A compressor's step (abyssal/kernels/pool.py).
#pragma once

#include "ops/rows.hpp"
#include "ops/span.hpp"

namespace abyssal {

struct CompressArgs {
  std::int64_t sequences;
  const Span* spans;
  std::int64_t ratio, dim;
  bool overlap;             // a block pools the one before it too, and tokens have 2 * dim channels
  const float* values;      // [tokens, width]
  const float* logits;      // [tokens, width], without the bias of their place
  const float* ape;         // [ratio, width]
  float* ring_values;       // position p of slot s in row s * ring_size + p % ring_size
  float* ring_logits;       // with the bias
  std::int64_t ring_size;
  const float* norm;        // [dim]
  float eps;
  std::int64_t rotated;
  const float* turn;        // [blocks, rotated / 2, 2]
  float* entries;           // null, or [rows, dim]: receives blocks that are not known
  Pages pages;
  float* out;               // [blocks, dim]
};

}  // namespace abyssal
