// route: which experts a token meets, and their weights (kernels/router.py, architecture.md 2.10).
#pragma once

#include <cstdint>

namespace abyssal {

struct RouteArgs {
  std::int64_t tokens, experts, k;
  const float* logits;        // [tokens, experts]
  const float* bias;          // [experts], moves the choice alone; or null
  const std::int64_t* given;  // [tokens, k]: a choice made elsewhere, each below `experts`; or null
  float scale;                // what the weights of a token sum to
  float* weights;             // [tokens, k]
  std::int64_t* chosen;       // [tokens, k], by falling score; of equal ones the lower number first
};

}  // namespace abyssal
