// Sums over a row, in one order: value i goes to lane i % 16 of total i / 16 % 4; the totals are added in pairs, then
// the lanes.
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

// the values at i, zeros beyond `count`
inline Lanes load_at(const float* x, std::int64_t i, std::int64_t count) {
  return i + lanes <= count ? load(x + i) : load_some(x + i, static_cast<int>(count - i));
}
inline void store_at(float* x, std::int64_t i, std::int64_t count, Lanes value) {
  if (i + lanes <= count) store(x + i, value);
  else store_some(x + i, value, static_cast<int>(count - i));
}

// x[0]^2 + x[1]^2 + ...
inline float sum_of_squares(const float* x, std::int64_t count) {
  Lanes totals[4] = {zeros(), zeros(), zeros(), zeros()};
  std::int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Lanes value = load(x + i + k * lanes);
      totals[k] = fma(value, value, totals[k]);
    }
  for (int k = 0; i < count; i += lanes, ++k) {
    const Lanes value = load_at(x, i, count);
    totals[k] = fma(value, value, totals[k]);
  }
  return sum(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
}

// 1 / sqrt(mean of squares + eps)
inline float inverse_rms(float squares, std::int64_t count, float eps) {
  return 1.0f / __builtin_sqrtf(squares * (1.0f / static_cast<float>(count)) + eps);
}

}  // namespace abyssal::ABYSSAL_ISA
