// Rotations of pairs of neighbouring values.
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

// Multiply `pairs` complex numbers by those of `turn`, or by their conjugates. Written with fma: GCC makes its own of
// products and sums of this pattern, whatever -ffp-contract says, where the instruction set has one.
template <bool back>
inline void turn_pairs(float* x, const float* turn, std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const float re = x[2 * i], im = x[2 * i + 1], cosine = turn[2 * i], sine = back ? -turn[2 * i + 1] : turn[2 * i + 1];
    x[2 * i] = __builtin_fmaf(re, cosine, -(im * sine));
    x[2 * i + 1] = __builtin_fmaf(im, cosine, re * sine);
  }
}

}  // namespace abyssal::ABYSSAL_ISA
