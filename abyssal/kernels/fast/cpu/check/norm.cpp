#include "ops/norm.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_norm(const Kernels& kernels) {
  for (const std::int64_t width : {2, 15, 16, 63, 64, 130})
    for (const std::int64_t rows : {0, 2, 6, 600}) {
      const auto x = normal(rows * width), weight = normal(width), turn = normal(rows / 2 * 2);
      for (const bool normed : {false, true})
        for (const float* turned : {static_cast<const float*>(nullptr), turn.data()}) {
          std::vector<float> got(x.size()), want(x.size());
          NormArgs a{rows, width, x.data(), normed, weight.data(), 1e-6f, turned, 2, 2, rows == 6, got.data()};
          kernels.norm(a);
          a.y = want.data();
          plain().norm(a);
          ABYSSAL_EXPECT(got == want);
        }
    }
}

}  // namespace abyssal
