// draw: the token whose logit and Gumbel noise are the largest together (kernels/draw.py).
#pragma once

#include <cstdint>

namespace abyssal {

struct DrawArgs {
  std::int64_t count;
  const double* logits;     // of the whole vocabulary
  const std::int64_t* ids;  // [count] in rising order, which tokens take part; null: the first `count`
  std::uint64_t key[2], place;
  std::int64_t* token;      // the lowest of equal ones; -1 where NumPy would draw a number twice, or nothing is finite
};

}  // namespace abyssal
