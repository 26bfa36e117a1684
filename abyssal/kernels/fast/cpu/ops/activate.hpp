// The gated activation of an expert, for swiglu and experts.
#pragma once

#include "vec/exp.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

// silu(min(gate, limit)) * clamp(up, -limit, limit) * gain. NaN stays NaN. `out` may be one of the others.
inline void activate(const float* gate, const float* up, float* out, std::int64_t width, float limit, float gain) {
  const Lanes most = all(limit), least = all(-limit), factor = all(gain);
  for (std::int64_t i = 0; i < width; i += lanes) {
    const Lanes g = smaller(most, load_at(gate, i, width));
    const Lanes u = smaller(most, larger(least, load_at(up, i, width)));
    store_at(out, i, width, mul(mul(mul(g, sigmoid(g)), u), factor));
  }
}

}  // namespace abyssal::ABYSSAL_ISA
