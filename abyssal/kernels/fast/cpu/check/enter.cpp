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
          std::vector<float> y[2], post[2], mix[2];
          for (int i = 0; i < 2; ++i) {
            y[i].resize(static_cast<std::size_t>(tokens * width));
            post[i].resize(static_cast<std::size_t>(tokens * streams));
            mix[i].resize(static_cast<std::size_t>(tokens * streams * streams + 1));
            const EnterArgs a{tokens,      streams,      width, x.data(), fn.data(),        base.data(),
                              scale.data(), mixed ? norm.data() : nullptr, 1e-6f, 1e-6f, 5, y[i].data(), post[i].data(),
                              mixed ? mix[i].data() : nullptr};
            (i == 0 ? kernels : plain()).enter(a);
          }
          ABYSSAL_EXPECT(y[0] == y[1] && post[0] == post[1] && mix[0] == mix[1]);
        }
}

}  // namespace abyssal
