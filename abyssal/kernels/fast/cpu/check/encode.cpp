#include "ops/encode.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_encode(const Kernels& kernels) {
  for (const bool key : {false, true})
    for (const auto& [dim, rotated] : {std::pair{2, 2}, {96, 32}, {130, 0}, {512, 64}})
      for (const std::int64_t rows : {0, 1, 70}) {
        const std::int64_t plain = dim - rotated;
        const std::int64_t bytes = key ? dim / 2 + (dim + 31) / 32 : (plain + 2 * rotated + (plain + 63) / 64 + 7) / 8 * 8;
        const auto x = normal(rows * dim);
        std::vector<std::uint8_t> got(static_cast<std::size_t>(rows * bytes)), want(got.size());
        kernels.encode({key, rows, dim, rotated, bytes, x.data(), got.data()});
        abyssal::plain().encode({key, rows, dim, rotated, bytes, x.data(), want.data()});
        ABYSSAL_EXPECT(got == want);
      }
}

}  // namespace abyssal
