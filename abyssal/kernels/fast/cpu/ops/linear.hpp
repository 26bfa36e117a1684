// linear: rows times the transpose of one or several matrices of equal shape (kernels/linear.py holds the contract).
#pragma once

#include <cstdint>

#include "ops/weight.hpp"

namespace abyssal {

struct LinearArgs {
  Weight weight;          // the first of the matrices; the others follow it
  bool stored;            // data and scales lie as in a release, row-major: strips are packed for this call
  std::int64_t matrices;  // 1, or the number of experts or groups
  // which rows or columns meet matrix e
  const std::int64_t* firsts;  // [matrices + 1]: rows firsts[e] to firsts[e + 1]; null: all rows
  bool columns;                // columns e * inputs of x go to columns e * outputs of y
  std::int64_t rows;
  bool bfloat16;                    // the type of x and y: bfloat16 or float32
  const void* x;                    // [rows, inputs], or [rows, matrices * inputs] for columns
  void* y;                          // [rows, outputs], or [rows, matrices * outputs]
  std::int64_t x_stride, y_stride;  // values from row to row
};

}  // namespace abyssal
