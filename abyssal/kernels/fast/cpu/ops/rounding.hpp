// rounding: rows rounded to FP8 or FP4 and back, or turned by a Hadamard matrix, to the bit as abyssal.quant.
#pragma once

#include <cstdint>

namespace abyssal {

enum class Rounding : int { float8, float4, hadamard };

struct RoundingArgs {
  Rounding kind;
  std::int64_t rows, width, block;  // values that share a scale; hadamard: width is a power of two
  const float* x;                   // [rows, width]
  float* y;                         // [rows, width]; may be x
};

}  // namespace abyssal
