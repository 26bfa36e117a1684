#include "ops/streams.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_leave(const Kernels& kernels) {
  for (const std::int64_t streams : {1, 4, 5})
    for (const std::int64_t width : {1, 17, 96})
      for (const std::int64_t tokens : {0, 1, 37}) {
        const auto y = normal(tokens * width), x = normal(tokens * streams * width), post = normal(tokens * streams);
        const auto mix = normal(tokens * streams * streams);
        std::vector<float> got(x.size()), want(x.size());
        kernels.leave({tokens, streams, width, y.data(), x.data(), post.data(), mix.data(), got.data()});
        plain().leave({tokens, streams, width, y.data(), x.data(), post.data(), mix.data(), want.data()});
        ABYSSAL_EXPECT(got == want);
      }
}

}  // namespace abyssal
