#include "ops/index_topk.hpp"

#include <array>
#include <cstring>

#include "check/check.hpp"

namespace abyssal {

void check_index_topk(const Kernels& kernels) {
  for (const bool packed : {false, true})
    for (const auto& [heads, dim, blocks, k] :
         {std::array<std::int64_t, 4>{1, 2, 0, 3}, {3, 34, 40, 5}, {5, 64, 333, 17}, {4, 128, 9000, 64}}) {
      const std::int64_t per_page = 32, pages = blocks / per_page + 1;
      const std::int64_t bytes = packed ? dim / 2 + (dim + 31) / 32 : 4 * dim;
      std::vector<std::uint8_t> keys(static_cast<std::size_t>((1 + pages * per_page) * bytes));
      const auto values = normal((1 + pages * per_page) * dim);
      if (packed) {
        for (auto& byte : keys) byte = static_cast<std::uint8_t>(120 + random_below(16));
      } else {
        std::memcpy(keys.data(), values.data(), keys.size());
      }
      std::vector<std::int64_t> table;
      for (std::int64_t i = pages; i-- > 0;) table.push_back(i);
      const std::vector<std::int64_t> firsts{0, 2, 3};
      const std::vector<std::int64_t> visible{blocks, blocks / 2, blocks};
      table.insert(table.end(), table.begin(), table.end());
      auto q = normal(3 * heads * dim);
      const auto weights = normal(3 * heads);
      // FP4 numbers now and then, for which there is a way of its own
      if (packed && heads != 5)
        for (auto& value : q) value = static_cast<float>(random_below(9) - 4);
      std::vector<std::int64_t> got(static_cast<std::size_t>(3 * k)), want(got.size());
      IndexTopkArgs args{2, firsts.data(), heads, k, q.data(), weights.data(), visible.data(),
                         {packed ? Stored::key : Stored::float32, keys.data(), bytes, dim, 0},
                         {per_page, pages, table.data()}, got.data()};
      kernels.index_topk(args);
      args.blocks = want.data();
      plain().index_topk(args);
      ABYSSAL_EXPECT(got == want);
    }
}

}  // namespace abyssal
