// experts: the routed experts of each token and the shared one, with clamp and routing weights, summed
// (kernels/experts.py, architecture.md 2.10).
#pragma once

#include <cstdint>

#include "ops/weight.hpp"

namespace abyssal {

// The three weights of one or several experts: w1 (gate) and w3 (up) [width, inner], w2 (down) [inner, width].
struct ExpertWeights {
  Weight w1, w3, w2;
  bool stored[3];         // not packed, as in LinearArgs
  std::int64_t matrices;  // 0: there are none
};

// Where gates and ups [rows, inner] are kept for the way back, before clamp and activation; null: they are not.
struct Kept {
  float* gate;
  float* up;
};

struct ExpertsArgs {
  ExpertWeights routed, shared;
  std::int64_t tokens, k;
  const float* x;              // [tokens, width]
  const float* gains;          // [tokens, k]
  const std::int64_t* chosen;  // [tokens, k], each below routed.matrices
  float limit;                 // of the clamp
  std::int64_t block;          // round what enters a product to FP8, a scale for so many values; 0: do not
  float* y;                    // [tokens, width]
  Kept kept_routed;            // rows sorted by expert, of one expert by token
  Kept kept_shared;            // rows are tokens
};

}  // namespace abyssal
