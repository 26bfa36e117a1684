// swiglu: the clamped gated activation of rows (kernels/swiglu.py, architecture.md 2.10).
#pragma once

#include <cstdint>

namespace abyssal {

struct SwigluArgs {
  std::int64_t rows, width;
  const float* gate;   // [rows, width]
  const float* up;     // [rows, width]
  const float* gains;  // [rows], or null for 1
  float limit;
  float* y;            // [rows, width]
};

}  // namespace abyssal
