#include "steps/moe.hpp"

#include <cstring>
#include <memory>

#include "ops/route.hpp"

namespace abyssal {

void moe_step(const Kernels& k, const MoeWeights& w, std::int64_t tokens, const float* streams, const std::int64_t* ids,
              float* out) {
  const Entered entered(k, w.site, streams, tokens);
  const std::int64_t experts = w.gate.weight.outputs;
  const Values logits(tokens * experts), gains(tokens * w.k), y(tokens * w.site.width);
  const auto count = static_cast<std::size_t>(tokens * w.k);
  const std::unique_ptr<std::int64_t[]> chosen(new std::int64_t[count]), given(new std::int64_t[w.table ? count : 0]);
  if (w.table != nullptr)
    for (std::int64_t t = 0; t < tokens; ++t)
      std::memcpy(&given[t * w.k], w.table + ids[t] * w.k, static_cast<std::size_t>(w.k) * sizeof(std::int64_t));
  w.gate.multiply(k, entered.x.get(), tokens, logits.get());
  k.route({tokens, experts, w.k, logits.get(), w.bias, w.table ? given.get() : nullptr, w.scale, gains.get(),
           chosen.get()});
  k.experts({w.routed, w.shared, tokens, w.k, entered.x.get(), gains.get(), chosen.get(), w.limit, w.block, y.get(),
             {}, {}});
  entered.leave(k, w.site, y.get(), streams, tokens, out);
}

}  // namespace abyssal
