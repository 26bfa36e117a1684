#include "ops/streams.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_enter(const Kernels& kernels) {
  for (const std::int64_t streams : {1, 2, 4, 5})
    for (const std::int64_t width : {1, 17, 96})
      for (const std::int64_t tokens : {0, 1, 3, 4, 6, 37})
        for (const bool mixed : {false, true}) {
          const std::int64_t gates = mixed ? (2 + streams) * streams : streams;
          const auto x = normal(tokens * streams * width), fn = normal(gates * streams * width), base = normal(gates);
          const auto scale = normal(3), norm = normal(width);
          const Site site{tokens,      streams,       width,        x.data(), fn.data(), base.data(),
                          scale.data(), mixed ? norm.data() : nullptr, 1e-6f,    1e-6f,     5, mixed};
          std::vector<float> y[2], post[2], mix[2];
          for (int i = 0; i < 2; ++i) {
            y[i].resize(static_cast<std::size_t>(tokens * width));
            post[i].resize(static_cast<std::size_t>(tokens * streams));
            mix[i].resize(static_cast<std::size_t>(tokens * streams * streams));
            (i == 0 ? kernels : plain()).enter({site, y[i].data(), post[i].data(), mix[i].data()});
          }
          ABYSSAL_EXPECT(y[0] == y[1] && post[0] == post[1] && mix[0] == mix[1]);
        }
}

void check_enter_backward(const Kernels& kernels) {
  for (const std::int64_t streams : {1, 2, 4, 5})
    for (const std::int64_t width : {1, 17, 96})
      for (const std::int64_t tokens : {0, 1, 37, 300})
        for (const bool mixed : {false, true}) {
          const std::int64_t gates = mixed ? (2 + streams) * streams : streams;
          const auto x = normal(tokens * streams * width), fn = normal(gates * streams * width), base = normal(gates);
          const auto scale = normal(3), norm = normal(width);
          const auto dy = normal(tokens * width), dpost = normal(tokens * streams);
          const auto dmix = normal(tokens * streams * streams);
          const Site site{tokens,      streams,       width,        x.data(), fn.data(), base.data(),
                          scale.data(), mixed ? norm.data() : nullptr, 1e-6f,    1e-6f,     5, mixed};
          std::vector<float> got[2][5];
          for (int i = 0; i < 2; ++i) {
            const std::size_t sizes[] = {x.size(), fn.size(), base.size(), 3, norm.size()};
            for (int k = 0; k < 5; ++k) got[i][k].resize(sizes[k]);
            (i == 0 ? kernels : plain())
                .enter_backward({site, dy.data(), dpost.data(), dmix.data(), got[i][0].data(), got[i][1].data(),
                                 got[i][2].data(), got[i][3].data(), got[i][4].data()});
          }
          for (int k = 0; k < 5; ++k) ABYSSAL_EXPECT(got[0][k] == got[1][k]);
        }
}

}  // namespace abyssal
