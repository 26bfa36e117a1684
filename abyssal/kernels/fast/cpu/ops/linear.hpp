// linear: rows times the transpose of one or several matrices of equal shape (kernels/linear.py holds the contract).
#pragma once

#include <cstdint>

#include "ops/weight.hpp"

namespace abyssal {

struct LinearArgs {
  Weight weight;               // the first of the matrices; the others follow it
  std::int64_t matrices;       // 1, or the number of experts
  const std::int64_t* firsts;  // [matrices + 1]: rows firsts[e] to firsts[e + 1] meet matrix e; null for one matrix
  std::int64_t rows;
  bool bfloat16;               // the type of x and y: bfloat16 or float32
  const void* x;               // [rows, inputs]
  void* y;                     // [rows, outputs]
};

}  // namespace abyssal
