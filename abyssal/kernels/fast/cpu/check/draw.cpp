#include "ops/draw.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_draw(const Kernels& kernels) {
  for (const std::int64_t count : {0, 1, 5, 4096, 40000}) {
    std::vector<double> logits;
    for (const float x : normal(count)) logits.push_back(3.0 * static_cast<double>(x));
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < count; i += 3) ids.push_back(i);
    for (const bool some : {false, true})
      for (std::uint64_t place = 0; place < 5; ++place) {
        std::int64_t want = 0, got = 0;
        DrawArgs a{some ? static_cast<std::int64_t>(ids.size()) : count, logits.data(), some ? ids.data() : nullptr,
                   {~std::uint64_t{0}, place}, place, &want};
        plain().draw(a);
        a.token = &got;
        kernels.draw(a);
        ABYSSAL_EXPECT(want == got && (count == 0) == (got == -1));
      }
  }
}

}  // namespace abyssal
