#include "ops/experts.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_experts(const Kernels& kernels) {
  constexpr std::int64_t experts = 5, width = 40, inner = 33, k = 3;
  const auto w1 = normal(experts * inner * width), w3 = normal(experts * inner * width),
             w2 = normal(experts * width * inner);
  const auto weight = [](const std::vector<float>& data, std::int64_t outputs, std::int64_t inputs) {
    return Weight{Format::float32, outputs, inputs, reinterpret_cast<const std::uint8_t*>(data.data()), nullptr, nullptr};
  };
  const ExpertWeights routed{weight(w1, inner, width), weight(w3, inner, width), weight(w2, width, inner),
                             {true, true, true}, experts};
  ExpertWeights one = routed;
  one.matrices = 1;
  for (const std::int64_t tokens : {0, 1, 7, 90})
    for (const std::int64_t block : {0, 32})
      for (const bool shared : {false, true}) {
        const auto x = normal(tokens * width), gains = normal(tokens * k);
        std::vector<std::int64_t> chosen(static_cast<std::size_t>(tokens * k));
        for (auto& e : chosen) e = random_below(experts);
        std::vector<float> got(x.size()), want(x.size());
        ExpertsArgs a{routed, shared ? one : ExpertWeights{}, tokens, k, x.data(), gains.data(), chosen.data(), 2.0f,
                      block, got.data(), {}, {}};
        kernels.experts(a);
        a.y = want.data();
        plain().experts(a);
        ABYSSAL_EXPECT(got == want);
      }
}

}  // namespace abyssal
