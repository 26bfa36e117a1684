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

void check_leave_backward(const Kernels& kernels) {
  for (const std::int64_t streams : {1, 4, 5})
    for (const std::int64_t width : {1, 17, 96})
      for (const std::int64_t tokens : {0, 1, 37}) {
        const auto y = normal(tokens * width), x = normal(tokens * streams * width), post = normal(tokens * streams);
        const auto mix = normal(tokens * streams * streams), dout = normal(tokens * streams * width);
        std::vector<float> got[2][4];
        for (int i = 0; i < 2; ++i) {
          const std::size_t sizes[] = {y.size(), x.size(), post.size(), mix.size()};
          for (int k = 0; k < 4; ++k) got[i][k].resize(sizes[k]);
          (i == 0 ? kernels : plain())
              .leave_backward({tokens, streams, width, y.data(), x.data(), post.data(), mix.data(), dout.data(),
                               got[i][0].data(), got[i][1].data(), got[i][2].data(), got[i][3].data()});
        }
        for (int k = 0; k < 4; ++k) ABYSSAL_EXPECT(got[0][k] == got[1][k]);
      }
}

}  // namespace abyssal
