#include "ops/encode.hpp"

#include <cstring>

#include "check/check.hpp"

namespace abyssal {

void check_encode(const Kernels& kernels) {
  for (const bool key : {false, true})
    for (const bool packed : {false, true})
      for (const std::int64_t dim : {2, 34, 96, 130}) {
        const std::int64_t rows = 5, rotated = key ? 0 : dim / 4 * 2, plain = dim - rotated;
        const Stored stored = !packed ? Stored::float32 : key ? Stored::key : Stored::entry;
        const std::int64_t bytes = !packed ? 4 * dim
                                   : key   ? dim / 2 + (dim + 31) / 32
                                           : (plain + 2 * rotated + (plain + 63) / 64 + 7) / 8 * 8;
        auto x = normal(rows * dim);
        x[0] = -0.0f;
        const std::vector<std::int64_t> places{2, -1, 0, 1, 3};
        std::vector<float> want((rows * bytes + 3) / 4), got(want);
        EncodeArgs a{rows, x.data(), key, {stored, nullptr, bytes, dim, rotated}, nullptr, places.data()};
        a.data = reinterpret_cast<std::uint8_t*>(want.data());
        abyssal::plain().encode(a);
        a.data = reinterpret_cast<std::uint8_t*>(got.data());
        kernels.encode(a);
        ABYSSAL_EXPECT(std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0);
      }
}

}  // namespace abyssal
