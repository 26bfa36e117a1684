#include "ops/route.hpp"

#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/exp.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t task_tokens = 32;
constexpr float tiny = 0x1p-126f;

// sqrt(log(1 + e^x)): below -15 its root is e^(x/2) to rounding, where the logarithm would lose digits
void sqrt_softplus(const float* x, float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += lanes) {
    const Lanes value = load_at(x, i, count), zero = zeros();
    const Lanes below = smaller(zero, value), above = larger(zero, value);
    float plain[lanes], small[lanes], large[lanes];
    store(plain, value);
    store(small, exp(mul(value, all(0.5f))));
    store(large, root(add(above, log1p(exp(sub(below, above))))));
    const int here = static_cast<int>(count - i < lanes ? count - i : lanes);
    for (int k = 0; k < here; ++k) y[i + k] = plain[k] < -15.0f ? small[k] : large[k];
  }
}

// NaN counts as the largest, so that it shows
bool beats(float a, float b) { return b == b && !(a <= b); }

void choose(const float* ranked, std::int64_t count, std::int64_t k, std::int64_t* chosen) {
  std::int64_t held = 0;
  for (std::int64_t e = 0; e < count; ++e) {
    if (held == k && !beats(ranked[e], ranked[chosen[k - 1]])) continue;
    std::int64_t place = held < k ? held++ : k - 1;
    for (; place > 0 && beats(ranked[e], ranked[chosen[place - 1]]); --place) chosen[place] = chosen[place - 1];
    chosen[place] = e;
  }
}

void route_token(const RouteArgs& a, std::int64_t token, float* scores, float* ranked) {
  std::int64_t* chosen = a.chosen + token * a.k;
  float* weights = a.weights + token * a.k;
  sqrt_softplus(a.logits + token * a.experts, scores, a.experts);
  if (a.given != nullptr) {
    std::memcpy(chosen, a.given + token * a.k, static_cast<std::size_t>(a.k) * sizeof(std::int64_t));
  } else {
    for (std::int64_t e = 0; e < a.experts; ++e) ranked[e] = a.bias == nullptr ? scores[e] : scores[e] + a.bias[e];
    choose(ranked, a.experts, a.k, chosen);
  }
  float most = tiny, total = 0.0f;
  for (std::int64_t i = 0; i < a.k; ++i) most = larger(most, scores[chosen[i]]);
  // relative to the largest, so that even the sum of vanishing scores is not zero
  for (std::int64_t i = 0; i < a.k; ++i) {
    weights[i] = scores[chosen[i]] / most;
    total = total + weights[i];
  }
  total = larger(tiny, total);
  for (std::int64_t i = 0; i < a.k; ++i) weights[i] = weights[i] / total * a.scale;
}

}  // namespace

void route(const RouteArgs& a) {
  if (a.k == 0) return;
  parallel((a.tokens + task_tokens - 1) / task_tokens, [&](std::int64_t task) {
    Buffer<float> scores(a.experts), ranked(a.experts);
    const std::int64_t stop = (task + 1) * task_tokens < a.tokens ? (task + 1) * task_tokens : a.tokens;
    for (std::int64_t token = task * task_tokens; token < stop; ++token)
      route_token(a, token, &scores[0], &ranked[0]);
  });
}

}  // namespace abyssal::ABYSSAL_ISA
