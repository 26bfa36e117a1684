// norm: RMSNorm of rows, a rotation of their last values, or both (kernels/rms_norm.py, kernels/rotary.py).
#pragma once

#include <cstdint>

namespace abyssal {

struct NormArgs {
  std::int64_t rows, width;
  const float* x;          // [rows, width]
  bool normed;             // divide by the root mean square
  const float* weight;     // [width], or null; only if normed
  float eps;
  const float* turn;       // [rows / repeat, turned / 2, 2]: cosines and sines; null for no rotation
  std::int64_t repeat;     // neighbouring rows that share a rotation
  std::int64_t turned;     // how many of the last values are rotated; even
  bool inverse;            // turn back
  float* y;                // [rows, width]; may be x
};

}  // namespace abyssal
