#include "ops/experts_backward.hpp"

#include "ops/activate.hpp"
#include "ops/by_expert.hpp"
#include "ops/outer.hpp"
#include "vec/masks.hpp"
#include "vec/round.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t piece_rows = 32 * tile_rows;  // rows of a product that make a task

// Many products at once: job(e) for every expert.
template <class Job>
void products(std::int64_t experts, const Job& job) {
  Buffer<std::int64_t> ends(experts);
  std::int64_t tasks = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const Outer m = job(e);
    ends[e] = tasks += (m.columns + panel_columns - 1) / panel_columns * ((m.rows + piece_rows - 1) / piece_rows);
  }
  if (tasks == 0) return;
  parallel(tasks, [&](std::int64_t task) {
    std::int64_t e = 0;
    while (task >= ends[e]) ++e;
    Outer m = job(e);
    const std::int64_t panels = (m.columns + panel_columns - 1) / panel_columns;
    const std::int64_t own = task - (e > 0 ? ends[e - 1] : 0);
    const std::int64_t row = own / panels * piece_rows, column = own % panels * panel_columns;
    m.a += row * m.row_step;
    m.c += row * m.c_stride;
    m.rows = m.rows - row < piece_rows ? m.rows - row : piece_rows;
    const std::int64_t vectors = (m.columns - column + lanes - 1) / lanes;
    outer_panel<>(m, column, static_cast<int>(vectors < tile_strips ? vectors : tile_strips));
  });
}

inline Lanes cleared(Lanes x, std::uint32_t bits) {
  if (bits == 0) return x;
  float values[lanes];
  store(values, x);
  for (int i = 0; i < lanes; ++i)
    if (bits >> i & 1) values[i] = 0.0f;
  return load(values);
}

// One row: `da` becomes the gradient of the gate, `dup` takes that of the up; returns that of the gain.
inline float activate_backward(const float* gate, const float* up, float* da, float* dup, std::int64_t width,
                               float limit, float gain) {
  const Lanes most = all(limit), least = all(-limit), factor = all(gain), one = all(1.0f);
  Lanes gains = zeros();
  for (std::int64_t i = 0; i < width; i += lanes) {
    const Lanes g = load_at(gate, i, width), u = load_at(up, i, width), grad = load_at(da, i, width);
    const Lanes low = smaller(most, g), in = smaller(most, larger(least, u));
    const Lanes half = sigmoid(low), silu = mul(low, half);
    gains = fma(grad, mul(silu, in), gains);
    const Lanes scaled = mul(grad, factor);
    const Lanes slope = mul(half, fma(low, sub(one, half), one));
    store_at(da, i, width, cleared(mul(mul(scaled, in), slope), not_below(g, most)));
    store_at(dup, i, width, cleared(mul(scaled, silu), not_below(u, most) | not_below(least, u)));
  }
  return sum(gains);
}

// Rows of all experts: gradients of the weights, and of each row's input into `dx`.
template <class DGain>
void pass_backward(const ExpertsBackwardArgs& a, const ExpertGradients& w, const std::int64_t* firsts,
                   std::int64_t rows, const float* x, const float* dy, const float* gains, const DGain& dgain,
                   float* dx) {
  const std::int64_t inner = w.inner, width = a.width, size = inner * width;
  Buffer<float> dgate(rows * inner), dup(rows * inner), active(rows * inner);
  const auto count = [&](std::int64_t e) { return firsts[e + 1] - firsts[e]; };
  const auto at = [&](float* values, std::int64_t e) { return values + firsts[e] * inner; };
  products(w.matrices, [&](std::int64_t e) {
    return Outer{count(e), inner, width, dy + firsts[e] * width, width, 1, w.w2 + e * size, inner,
                 at(dgate.data(), e), inner, false};
  });
  each_row(rows, inner, [&](std::int64_t row) {
    const float *gate = w.gate + row * inner, *up = w.up + row * inner;
    const float gain = gains == nullptr ? 1.0f : gains[row];
    float* to = &active[row * inner];
    activate(gate, up, to, inner, a.limit, gain);
    if (a.block > 0) round_row<E4m3>(to, to, inner, a.block);
    dgain(row, activate_backward(gate, up, &dgate[row * inner], &dup[row * inner], inner, a.limit, gain));
  });
  const auto of_inputs = [&](float* grads, float* dw) {
    products(w.matrices, [&](std::int64_t e) {
      return Outer{inner, width, count(e), at(grads, e), 1, inner, x + firsts[e] * width, width, dw + e * size, width,
                   false};
    });
  };
  of_inputs(dgate.data(), w.dw1);
  of_inputs(dup.data(), w.dw3);
  products(w.matrices, [&](std::int64_t e) {
    return Outer{width, inner, count(e), dy + firsts[e] * width, 1, width, at(active.data(), e), inner, w.dw2 + e * size,
                 inner, false};
  });
  const auto to_inputs = [&](float* grads, const float* weight, bool added) {
    products(w.matrices, [&](std::int64_t e) {
      return Outer{count(e), width, inner, at(grads, e), inner, 1, weight + e * size, width, dx + firsts[e] * width,
                   width, added};
    });
  };
  to_inputs(dgate.data(), w.w1, false);
  to_inputs(dup.data(), w.w3, true);
}

}  // namespace

void experts_backward(const ExpertsBackwardArgs& a) {
  const std::int64_t width = a.width, pairs = a.tokens * a.k;
  const float* x = a.x;
  Buffer<float> rounded(a.block > 0 ? a.tokens * width : 0);
  if (a.block > 0) {
    each_row(a.tokens, width, [&](std::int64_t t) {
      round_row<E4m3>(a.x + t * width, &rounded[t * width], width, a.block);
    });
    x = rounded.data();
  }
  const std::int64_t everyone[2] = {0, a.tokens};
  if (a.shared.matrices > 0)
    pass_backward(a, a.shared, everyone, a.tokens, x, a.dy, nullptr, [](std::int64_t, float) {}, a.dx);
  const ByExpert sorted(a.chosen, a.tokens, a.k, a.routed.matrices);
  Buffer<float> rows(pairs * width), grads(pairs * width), gains(pairs);
  each_row(pairs, width, [&](std::int64_t r) {
    const std::int64_t token = sorted.pair[r] / a.k;
    gains[r] = a.gains[sorted.pair[r]];
    std::memcpy(&rows[r * width], x + token * width, static_cast<std::size_t>(width) * sizeof(float));
    std::memcpy(&grads[r * width], a.dy + token * width, static_cast<std::size_t>(width) * sizeof(float));
  });
  // the rows' own gradients take the place of the rows, which are read for the last time before
  pass_backward(
      a, a.routed, sorted.firsts.data(), pairs, rows.data(), grads.data(), gains.data(),
      [&](std::int64_t row, float value) { a.dgains[sorted.pair[row]] = value; }, rows.data());
  // a token adds its experts in rising order, then the shared one
  each_row(a.tokens, width, [&](std::int64_t t) {
    float* to = a.dx + t * width;
    for (std::int64_t i = 0; i < width; i += lanes) {
      Lanes total = zeros();
      for (std::int64_t k = 0; k < a.k; ++k)
        total = add(total, load_at(&rows[sorted.place[t * a.k + k] * width], i, width));
      store_at(to, i, width, a.shared.matrices > 0 ? add(total, load_at(to, i, width)) : total);
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
