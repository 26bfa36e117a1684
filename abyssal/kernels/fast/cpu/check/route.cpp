#include "ops/route.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_route(const Kernels& kernels) {
  for (const std::int64_t experts : {1, 16, 37})
    for (const std::int64_t tokens : {0, 1, 70}) {
      const std::int64_t k = experts < 6 ? experts : 6;
      const auto logits = normal(tokens * experts), bias = normal(experts);
      std::vector<float> weights[2];
      std::vector<std::int64_t> chosen[2];
      for (int i = 0; i < 2; ++i) {
        weights[i].resize(static_cast<std::size_t>(tokens * k));
        chosen[i].resize(static_cast<std::size_t>(tokens * k));
        (i == 0 ? kernels : plain())
            .route({tokens, experts, k, logits.data(), bias.data(), nullptr, 1.5f, weights[i].data(), chosen[i].data()});
      }
      ABYSSAL_EXPECT(weights[0] == weights[1] && chosen[0] == chosen[1]);
    }
}

}  // namespace abyssal
