#include "ops/rounding.hpp"

#include "parallel.hpp"
#include "vec/round.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t task_values = 1 << 14;  // of one task: less is done before another thread has woken

// sums and differences at distance 1, 2, 4, ..., then the factor
void hadamard(float* y, std::int64_t width, float factor) {
  for (std::int64_t half = 1; half < width; half *= 2)
    for (std::int64_t first = 0; first < width; first += 2 * half)
      for (std::int64_t i = first; i < first + half; ++i) {
        const float low = y[i], high = y[i + half];
        y[i] = low + high;
        y[i + half] = low - high;
      }
  for (std::int64_t i = 0; i < width; ++i) y[i] *= factor;
}

}  // namespace

void rounding(const RoundingArgs& a) {
  if (a.rows == 0 || a.width == 0) return;
  const std::int64_t step = a.width >= task_values ? 1 : task_values / a.width;
  // as Python computes it: in double precision, cast when it multiplies
  const float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a.width)));
  parallel((a.rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (std::int64_t row = task * step; row < stop; ++row) {
      const float* x = a.x + row * a.width;
      float* y = a.y + row * a.width;
      switch (a.kind) {
        case Rounding::float8: round_row<E4m3>(x, y, a.width, a.block); break;
        case Rounding::float4: round_row<E2m1>(x, y, a.width, a.block); break;
        case Rounding::hadamard:
          if (x != y) std::memcpy(y, x, static_cast<std::size_t>(a.width) * sizeof(float));
          hadamard(y, a.width, factor);
      }
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
