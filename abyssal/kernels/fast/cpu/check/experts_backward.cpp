#include "ops/experts_backward.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_experts_backward(const Kernels& kernels) {
  constexpr std::int64_t experts = 5, width = 40, inner = 33, k = 3;
  const auto w1 = normal(experts * inner * width), w3 = normal(experts * inner * width),
             w2 = normal(experts * width * inner);
  for (const std::int64_t tokens : {0, 1, 7, 290})
    for (const std::int64_t block : {0, 32})
      for (const bool shared : {false, true}) {
        const auto x = normal(tokens * width), gains = normal(tokens * k), dy = normal(tokens * width);
        const auto gate = normal(tokens * k * inner), up = normal(tokens * k * inner);
        std::vector<std::int64_t> chosen(static_cast<std::size_t>(tokens * k));
        for (auto& e : chosen) e = random_below(experts);
        std::vector<float> got[2][8];
        for (int i = 0; i < 2; ++i) {
          const std::size_t one = static_cast<std::size_t>(inner * width);
          const std::size_t sizes[] = {w1.size(), w3.size(), w2.size(), one, one, one, x.size(), gains.size()};
          for (int j = 0; j < 8; ++j) got[i][j].resize(sizes[j]);
          const auto set = [&](std::int64_t matrices, int first) {
            return ExpertGradients{matrices,    inner,     w1.data(), w3.data(), w2.data(), gate.data(),
                                   up.data(), got[i][first].data(), got[i][first + 1].data(),
                                   got[i][first + 2].data()};
          };
          (i == 0 ? kernels : plain())
              .experts_backward({set(experts, 0), shared ? set(1, 3) : ExpertGradients{}, tokens, k, width, x.data(),
                                 gains.data(), chosen.data(), 1.0f, block, dy.data(), got[i][6].data(),
                                 got[i][7].data()});
        }
        for (int j = 0; j < 8; ++j) ABYSSAL_EXPECT(got[0][j] == got[1][j]);
      }
}

}  // namespace abyssal
