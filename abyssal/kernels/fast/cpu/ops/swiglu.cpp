#include "ops/swiglu.hpp"

#include "ops/activate.hpp"
#include "parallel.hpp"

namespace abyssal::ABYSSAL_ISA {

void swiglu(const SwigluArgs& a) {
  constexpr std::int64_t task_values = 1 << 13;  // less is done before another thread has woken
  if (a.width == 0) return;
  const std::int64_t step = a.width >= task_values ? 1 : task_values / a.width;
  parallel((a.rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (std::int64_t row = task * step; row < stop; ++row)
      activate(a.gate + row * a.width, a.up + row * a.width, a.y + row * a.width, a.width, a.limit,
               a.gains == nullptr ? 1.0f : a.gains[row]);
  });
}

}  // namespace abyssal::ABYSSAL_ISA
