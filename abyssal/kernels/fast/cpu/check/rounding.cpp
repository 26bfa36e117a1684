#include "ops/rounding.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_rounding(const Kernels& kernels) {
  for (const Rounding kind : {Rounding::float8, Rounding::float4, Rounding::hadamard})
    for (const std::int64_t width : {1, 2, 64, 128})
      for (const std::int64_t rows : {0, 1, 300}) {
        const auto x = normal(rows * width);
        std::vector<float> got(x.size()), want(x.size());
        kernels.rounding({kind, rows, width, 48, x.data(), got.data()});
        plain().rounding({kind, rows, width, 48, x.data(), want.data()});
        ABYSSAL_EXPECT(got == want);
      }
}

}  // namespace abyssal
