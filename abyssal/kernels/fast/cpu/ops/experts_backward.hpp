// The way back through `experts` for weights in float32 (kernels/experts.py).
#pragma once

#include <cstdint>

namespace abyssal {

// One or several experts: weights, what their gates and ups were in the forward pass, and gradients of the weights.
struct ExpertGradients {
  std::int64_t matrices, inner;  // 0 matrices: there are none
  const float* w1;               // [matrices, inner, width]
  const float* w3;
  const float* w2;    // [matrices, width, inner]
  const float* gate;  // [rows, inner], rows sorted by expert, of one expert by token
  const float* up;
  float* dw1;
  float* dw3;
  float* dw2;
};

struct ExpertsBackwardArgs {
  ExpertGradients routed, shared;
  std::int64_t tokens, k, width;
  const float* x;              // [tokens, width]
  const float* gains;          // [tokens, k]
  const std::int64_t* chosen;  // [tokens, k], each below routed.matrices
  float limit;
  std::int64_t block;  // as in ExpertsArgs; roundings let gradients pass as they are
  const float* dy;     // [tokens, width]
  float* dx;           // [tokens, width]
  float* dgains;       // [tokens, k]
};

}  // namespace abyssal
