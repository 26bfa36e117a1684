#include "ops/streams.hpp"

#include "parallel.hpp"
#include "vec/exp.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t block_tokens = lanes;  // of a task; as many matrices are normalised side by side
constexpr std::int64_t few_tokens = 3;        // up to which one after another is faster
constexpr std::int64_t most_gates = (2 + most_streams) * most_streams;

// What fits into the registers: gates of one token; tokens and gates of a tile.
constexpr int row_gates = tile_strips == 4 ? 12 : 4, tile_tokens = tile_strips == 4 ? 4 : 2,
              tile_gates = tile_strips == 4 ? 6 : 2;

// Products of R tokens with G rows of fn: value i goes to lane i % 16, then the lanes are added.
template <int R, int G>
void products(const EnterArgs& a, const float* x, std::int64_t gate, float (*out)[most_gates]) {
  const std::int64_t width = a.streams * a.width;
  const float* fn = a.fn + gate * width;
  Lanes totals[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) totals[r][g] = zeros();
  std::int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    Lanes value[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) value[r] = load(x + r * width + i);
#pragma GCC unroll 12
    for (int g = 0; g < G; ++g) {
      const Lanes row = load(fn + g * width + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) totals[r][g] = fma(row, value[r], totals[r][g]);
    }
  }
  if (i < width)
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r)
        totals[r][g] = fma(load_at(fn + g * width, i, width), load_at(x + r * width, i, width), totals[r][g]);
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) out[r][gate + g] = sum(totals[r][g]);
}

template <int R, int G>
void all_products(const EnterArgs& a, const float* x, std::int64_t gates, float (*out)[most_gates]) {
  std::int64_t gate = 0;
  for (; gate + G <= gates; gate += G) products<R, G>(a, x, gate, out);
  for (; gate < gates; ++gate) products<R, 1>(a, x, gate, out);
}

// Softmax over each row, then column and row steps in turn; `mix` [streams * streams].
template <class V>
void normalise(V* mix, int n, int iterations, V eps) {
  const V one = same<V>(1.0f);
  for (int j = 0; j < n; ++j) {
    V* row = mix + j * n;
    V most = row[0];
    for (int k = 1; k < n; ++k) most = larger(most, row[k]);
    for (int k = 0; k < n; ++k) row[k] = exp(sub(row[k], most));
    V total = row[0];
    for (int k = 1; k < n; ++k) total = add(total, row[k]);
    for (int k = 0; k < n; ++k) row[k] = add(div(row[k], total), eps);
  }
  for (int step = 0; step < 2 * iterations - 1; ++step) {
    // one division for each sum; the quotient is a product, another rounding of half a unit
    const int across = step % 2 == 0 ? n : 1, along = step % 2 == 0 ? 1 : n;
    for (int line = 0; line < n; ++line) {
      V* first = mix + line * along;
      V total = first[0];
      for (int k = 1; k < n; ++k) total = add(total, first[k * across]);
      const V factor = div(one, add(total, eps));
      for (int k = 0; k < n; ++k) first[k * across] = mul(first[k * across], factor);
    }
  }
}

// Gates of one token, or of sixteen side by side, in place: pre, 2 post, mix.
template <class V>
void gates_of(const EnterArgs& a, V* gates) {
  const int n = static_cast<int>(a.streams);
  const V eps = same<V>(a.eps);
  for (int j = 0; j < n; ++j)
    gates[j] = add(sigmoid(fma(gates[j], same<V>(a.scale[0]), same<V>(a.base[j]))), eps);
  if (a.mix == nullptr) return;
  for (int j = n; j < 2 * n; ++j) {
    const V value = sigmoid(fma(gates[j], same<V>(a.scale[1]), same<V>(a.base[j])));
    gates[j] = add(value, value);
  }
  for (int j = 2 * n; j < (2 + n) * n; ++j) gates[j] = fma(gates[j], same<V>(a.scale[2]), same<V>(a.base[j]));
  if (n == 4) normalise(gates + 8, 4, a.iterations, eps);  // a constant, for the compiler
  else normalise(gates + 2 * n, n, a.iterations, eps);
}

void collapse(const EnterArgs& a, std::int64_t token, const float* pre) {
  const float* x = a.x + token * a.streams * a.width;
  float* y = a.y + token * a.width;
  for (std::int64_t i = 0; i < a.width; i += lanes) {
    Lanes total = mul(load_at(x, i, a.width), all(pre[0]));
    for (std::int64_t j = 1; j < a.streams; ++j) total = fma(load_at(x + j * a.width, i, a.width), all(pre[j]), total);
    store_at(y, i, a.width, total);
  }
  if (a.norm == nullptr) return;
  const Lanes factor = all(inverse_rms(sum_of_squares(y, a.width), a.width, a.rms_eps));
  for (std::int64_t i = 0; i < a.width; i += lanes)
    store_at(y, i, a.width, mul(mul(load_at(y, i, a.width), factor), load_at(a.norm, i, a.width)));
}

void enter_block(const EnterArgs& a, std::int64_t first, std::int64_t count, std::int64_t gates) {
  const std::int64_t width = a.streams * a.width;
  const float* x = a.x + first * width;
  alignas(64) float values[block_tokens][most_gates];
  std::int64_t token = 0;
  for (; token + tile_tokens <= count; token += tile_tokens)
    all_products<tile_tokens, tile_gates>(a, x + token * width, gates, values + token);
  for (; token < count; ++token) all_products<1, row_gates>(a, x + token * width, gates, values + token);
  for (token = 0; token < count; ++token) {
    const float factor = inverse_rms(sum_of_squares(x + token * width, width), width, a.rms_eps);
    for (std::int64_t g = 0; g < gates; ++g) values[token][g] *= factor;
  }
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
    if (a.mix == nullptr) continue;
    const std::int64_t n = a.streams;
    std::memcpy(a.post + (first + token) * n, values[token] + n, static_cast<std::size_t>(n) * sizeof(float));
    std::memcpy(a.mix + (first + token) * n * n, values[token] + 2 * n, static_cast<std::size_t>(n * n) * sizeof(float));
  }
}

}  // namespace

void enter(const EnterArgs& a) {
  const std::int64_t gates = a.mix == nullptr ? a.streams : (2 + a.streams) * a.streams;
  const std::int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  if (blocks == 0) return;
  parallel(blocks, [&](std::int64_t block) {
    const std::int64_t first = block * block_tokens;
    enter_block(a, first, a.tokens - first < block_tokens ? a.tokens - first : block_tokens, gates);
  });
}

}  // namespace abyssal::ABYSSAL_ISA
