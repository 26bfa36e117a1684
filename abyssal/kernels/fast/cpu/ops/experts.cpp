#include "ops/experts.hpp"

#include "ops/activate.hpp"
#include "ops/linear.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/round.hpp"

namespace abyssal::ABYSSAL_ISA {

void linear(const LinearArgs&);

namespace {

constexpr std::int64_t task_values = 1 << 13;  // of one task: less is done before another thread has woken

// Call body(row) for every row; neighbouring rows share a task.
template <class Body>
void each_row(std::int64_t rows, std::int64_t width, const Body& body) {
  const std::int64_t step = width >= task_values ? 1 : task_values / (width < 1 ? 1 : width);
  parallel((rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (std::int64_t row = task * step; row < stop; ++row) body(row);
  });
}

void product(const Weight& w, bool stored, std::int64_t matrices, const std::int64_t* firsts, std::int64_t rows,
             const float* x, float* y) {
  linear({w, stored, matrices, firsts, false, rows, false, x, y, w.inputs, w.outputs});
}

// Rows through w1, w3 and w2; row r takes gains[r], or 1 if there are none.
void pass(const ExpertsArgs& a, const ExpertWeights& w, const std::int64_t* firsts, std::int64_t rows, const float* x,
          const float* gains, float* y) {
  const std::int64_t inner = w.w1.outputs;
  Buffer<float> gate(rows * inner), up(rows * inner);
  if (rows == 0) return;
  product(w.w3, w.stored[1], w.matrices, firsts, rows, x, &up[0]);
  product(w.w1, w.stored[0], w.matrices, firsts, rows, x, &gate[0]);
  each_row(rows, inner, [&](std::int64_t row) {
    float* values = &gate[row * inner];
    activate(values, &up[row * inner], values, inner, a.limit, gains == nullptr ? 1.0f : gains[row]);
    if (a.block > 0) round_row<E4m3>(values, values, inner, a.block);
  });
  product(w.w2, w.stored[2], w.matrices, firsts, rows, &gate[0], y);
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
  // rows sorted by expert; of one expert, by token
  Buffer<std::int64_t> firsts(matrices + 1), next(matrices + 1), place(pairs), held(a.tokens);
  for (std::int64_t e = 0; e <= matrices; ++e) firsts[e] = 0;
  for (std::int64_t p = 0; p < pairs; ++p) ++firsts[a.chosen[p] + 1];
  for (std::int64_t e = 0; e < matrices; ++e) firsts[e + 1] += firsts[e];
  for (std::int64_t e = 0; e <= matrices; ++e) next[e] = firsts[e];
  Buffer<std::int64_t> pair_at(pairs);
  for (std::int64_t p = 0; p < pairs; ++p) pair_at[next[a.chosen[p]]++] = p;
  Buffer<float> rows(pairs * width), gains(pairs), parts(pairs * width);
  for (std::int64_t t = 0; t < a.tokens; ++t) held[t] = 0;
  for (std::int64_t r = 0; r < pairs; ++r) {
    const std::int64_t token = pair_at[r] / a.k;
    gains[r] = a.gains[pair_at[r]];
    place[token * a.k + held[token]++] = r;  // rising by expert
  }
  if (pairs > 0) {
    each_row(pairs, width, [&](std::int64_t r) {
      std::memcpy(&rows[r * width], x + pair_at[r] / a.k * width, static_cast<std::size_t>(width) * sizeof(float));
    });
    pass(a, a.routed, &firsts[0], pairs, &rows[0], &gains[0], &parts[0]);
  }
  Buffer<float> shared(a.shared.matrices > 0 ? a.tokens * width : 0);
  if (shared.size() > 0) pass(a, a.shared, nullptr, a.tokens, x, nullptr, &shared[0]);
  // a token adds its experts in rising order, then the shared one
  each_row(a.tokens, width, [&](std::int64_t t) {
    for (std::int64_t i = 0; i < width; i += lanes) {
      Lanes total = zeros();
      for (std::int64_t k = 0; k < a.k; ++k) total = add(total, load_at(&parts[place[t * a.k + k] * width], i, width));
      if (shared.size() > 0) total = add(total, load_at(&shared[t * width], i, width));
      store_at(a.y + t * width, i, width, total);
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
