#include "ops/experts.hpp"

#include "ops/activate.hpp"
#include "ops/by_expert.hpp"
#include "ops/linear.hpp"
#include "vec/round.hpp"

namespace abyssal::ABYSSAL_ISA {

void linear(const LinearArgs&);

namespace {

void product(const Weight& w, bool stored, std::int64_t matrices, const std::int64_t* firsts, std::int64_t rows,
             const float* x, float* y) {
  linear({w, stored, matrices, firsts, false, rows, false, x, y, w.inputs, w.outputs});
}

// Rows through w1, w3 and w2; row r takes gains[r], or 1 if there are none. Keeps gates and ups where wanted.
void pass(const ExpertsArgs& a, const ExpertWeights& w, const std::int64_t* firsts, std::int64_t rows, const float* x,
          const float* gains, const Kept& kept, float* y) {
  const std::int64_t inner = w.w1.outputs;
  Buffer<float> values(rows * inner), ups(kept.up == nullptr ? rows * inner : 0);
  if (rows == 0) return;
  float* up = kept.up == nullptr ? &ups[0] : kept.up;
  float* gate = kept.gate == nullptr ? &values[0] : kept.gate;
  product(w.w3, w.stored[1], w.matrices, firsts, rows, x, up);
  product(w.w1, w.stored[0], w.matrices, firsts, rows, x, gate);
  each_row(rows, inner, [&](std::int64_t row) {
    float* to = &values[row * inner];
    activate(gate + row * inner, up + row * inner, to, inner, a.limit, gains == nullptr ? 1.0f : gains[row]);
    if (a.block > 0) round_row<E4m3>(to, to, inner, a.block);
  });
  product(w.w2, w.stored[2], w.matrices, firsts, rows, &values[0], y);
}

}  // namespace

void experts(const ExpertsArgs& a) {
  const std::int64_t width = a.routed.w1.inputs, matrices = a.routed.matrices, pairs = a.tokens * a.k;
  if (a.tokens == 0 || width == 0) return;
  const float* x = a.x;
  Buffer<float> rounded(a.block > 0 ? a.tokens * width : 0);
  if (a.block > 0) {
    each_row(a.tokens, width, [&](std::int64_t t) {
      round_row<E4m3>(a.x + t * width, &rounded[t * width], width, a.block);
    });
    x = &rounded[0];
  }
  const ByExpert sorted(a.chosen, a.tokens, a.k, matrices);
  Buffer<float> rows(pairs * width), gains(pairs), parts(pairs * width);
  for (std::int64_t r = 0; r < pairs; ++r) gains[r] = a.gains[sorted.pair[r]];
  if (pairs > 0) {
    each_row(pairs, width, [&](std::int64_t r) {
      std::memcpy(&rows[r * width], x + sorted.pair[r] / a.k * width, static_cast<std::size_t>(width) * sizeof(float));
    });
    pass(a, a.routed, &sorted.firsts[0], pairs, &rows[0], &gains[0], a.kept_routed, &parts[0]);
  }
  Buffer<float> shared(a.shared.matrices > 0 ? a.tokens * width : 0);
  if (shared.size() > 0) pass(a, a.shared, nullptr, a.tokens, x, nullptr, a.kept_shared, &shared[0]);
  // a token adds its experts in rising order, then the shared one
  each_row(a.tokens, width, [&](std::int64_t t) {
    for (std::int64_t i = 0; i < width; i += lanes) {
      Lanes total = zeros();
      for (std::int64_t k = 0; k < a.k; ++k) total = add(total, load_at(&parts[sorted.place[t * a.k + k] * width], i, width));
      if (shared.size() > 0) total = add(total, load_at(&shared[t * width], i, width));
      store_at(a.y + t * width, i, width, total);
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
