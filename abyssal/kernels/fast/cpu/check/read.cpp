#include "check/check.hpp"
#include "ops/read.hpp"

namespace abyssal {

void check_read(const Kernels& kernels) {
  for (const std::int64_t bytes : {0, 63, 64, 65, 1 << 20, 3000001}) {
    std::vector<std::uint8_t> data(static_cast<std::size_t>(bytes), 1);
    std::uint64_t sum = 0;
    kernels.read({data.data(), bytes, &sum});
    ABYSSAL_EXPECT(sum == 0x0101010101010101ULL * static_cast<std::uint64_t>(bytes / 64 * 8));
  }
}

}  // namespace abyssal
