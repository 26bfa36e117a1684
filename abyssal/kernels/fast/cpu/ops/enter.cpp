#include "ops/gates.hpp"
#include "parallel.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t few_tokens = 3;  // up to which one after another is faster

// Gates of one token, or of sixteen side by side, in place: pre, 2 post, mix.
template <class V>
void gates_of(const Site& a, V* gates) {
  const int n = static_cast<int>(a.streams);
  const V eps = same<V>(a.eps);
  for (int j = 0; j < n; ++j)
    gates[j] = add(sigmoid(fma(gates[j], same<V>(a.scale[0]), same<V>(a.base[j]))), eps);
  if (!a.mixed) return;
  for (int j = n; j < 2 * n; ++j) {
    const V value = sigmoid(fma(gates[j], same<V>(a.scale[1]), same<V>(a.base[j])));
    gates[j] = add(value, value);
  }
  for (int j = 2 * n; j < (2 + n) * n; ++j) gates[j] = fma(gates[j], same<V>(a.scale[2]), same<V>(a.base[j]));
  if (n == 4) normalise<false>(gates + 8, 4, a.iterations, eps);  // a constant, for the compiler
  else normalise<false>(gates + 2 * n, n, a.iterations, eps);
}

void collapse(const EnterArgs& a, std::int64_t token, const float* pre) {
  float* y = a.y + token * a.width;
  weigh(a, token, pre, y);
  if (a.norm == nullptr) return;
  const Lanes factor = all(inverse_rms(sum_of_squares(y, a.width), a.width, a.rms_eps));
  for (std::int64_t i = 0; i < a.width; i += lanes)
    store_at(y, i, a.width, mul(mul(load_at(y, i, a.width), factor), load_at(a.norm, i, a.width)));
}

void enter_block(const EnterArgs& a, std::int64_t first, std::int64_t count) {
  const std::int64_t gates = a.gates();
  alignas(64) float values[block_tokens][most_gates];
  float factors[block_tokens];
  project(a, first, count, values, factors);
  std::int64_t token;
  if (count <= few_tokens) {
    for (token = 0; token < count; ++token) gates_of(a, values[token]);
  } else {
    Lanes side[most_gates];
    for (std::int64_t g = 0; g < gates; ++g) {
      float column[lanes] = {};
      for (token = 0; token < count; ++token) column[token] = values[token][g];
      side[g] = load(column);
    }
    gates_of(a, side);
    for (std::int64_t g = 0; g < gates; ++g) {
      float column[lanes];
      store(column, side[g]);
      for (token = 0; token < count; ++token) values[token][g] = column[token];
    }
  }
  for (token = 0; token < count; ++token) {
    collapse(a, first + token, values[token]);
    if (!a.mixed) continue;
    const std::int64_t n = a.streams;
    std::memcpy(a.post + (first + token) * n, values[token] + n, static_cast<std::size_t>(n) * sizeof(float));
    std::memcpy(a.mix + (first + token) * n * n, values[token] + 2 * n, static_cast<std::size_t>(n * n) * sizeof(float));
  }
}

}  // namespace

void enter(const EnterArgs& a) {
  const std::int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  if (blocks == 0) return;
  parallel(blocks, [&](std::int64_t block) {
    const std::int64_t first = block * block_tokens;
    enter_block(a, first, a.tokens - first < block_tokens ? a.tokens - first : block_tokens);
  });
}

}  // namespace abyssal::ABYSSAL_ISA
