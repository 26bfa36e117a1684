#include "ops/swiglu.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_swiglu(const Kernels& kernels) {
  for (const std::int64_t width : {1, 15, 64, 130})
    for (const std::int64_t rows : {0, 1, 200}) {
      const auto gate = normal(rows * width), up = normal(rows * width), gains = normal(rows);
      std::vector<float> got(gate.size()), want(gate.size());
      kernels.swiglu({rows, width, gate.data(), up.data(), gains.data(), 1.0f, got.data()});
      plain().swiglu({rows, width, gate.data(), up.data(), gains.data(), 1.0f, want.data()});
      ABYSSAL_EXPECT(got == want);
    }
}

}  // namespace abyssal
