#include "ops/gates.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t chunk_blocks = 8;  // blocks of a task, whose sums are added before they join those of others

// Vectors of a tile of gradients, beside its rows: tokens of dx, gates of dfn.
constexpr int tile_vectors = tile_strips == 4 ? 4 : 1, dx_tokens = 4, dfn_gates = tile_strips == 4 ? 6 : 4;

// What each task leaves for the sums over all tokens, one after another.
struct Sums {
  std::int64_t fn, base, scale, norm, size;  // places, and numbers of a task
  Buffer<float> parts;

  Sums(const Site& a, std::int64_t tasks)
      : fn(0), base(a.gates() * a.streams * a.width), scale(base + a.gates()), norm(scale + 3),
        size((norm + (a.norm == nullptr ? 0 : a.width) + lanes - 1) / lanes * lanes), parts(tasks * size) {}
};

// Back through `normalise`, in place: each step was y = x / (sum of x + eps).
inline void normalise_backward(Lanes* grad, int n, int iterations, const Lanes* kept) {
  for (int step = 2 * iterations - 2; step >= 0; --step) {
    const int across = step % 2 == 0 ? n : 1, along = step % 2 == 0 ? 1 : n;
    const Lanes* factors = kept + n * n + step * (n + n * n);
    const Lanes* results = factors + n;
    for (int line = 0; line < n; ++line) {
      Lanes* first = grad + line * along;
      const Lanes* result = results + line * along;
      Lanes shared = mul(first[0], result[0]);
      for (int k = 1; k < n; ++k) shared = fma(first[k * across], result[k * across], shared);
      for (int k = 0; k < n; ++k) first[k * across] = mul(sub(first[k * across], shared), factors[line]);
    }
  }
  for (int j = 0; j < n; ++j) {
    Lanes* row = grad + j * n;
    const Lanes* share = kept + j * n;
    Lanes shared = mul(row[0], share[0]);
    for (int k = 1; k < n; ++k) shared = fma(row[k], share[k], shared);
    for (int k = 0; k < n; ++k) row[k] = mul(sub(row[k], shared), share[k]);
  }
}

// The gradient of a token's collapsed streams into `du`, that of its gates `pre` into `dpre`; adds to the norm's.
inline void collapse_backward(const EnterBackwardArgs& a, std::int64_t token, const float* pre, float* du, float* dpre,
                              float* dnorm) {
  const float* dy = a.dy + token * a.width;
  const float* x = a.x + token * a.streams * a.width;
  if (a.norm == nullptr) {
    std::memcpy(du, dy, static_cast<std::size_t>(a.width) * sizeof(float));
  } else {
    weigh(a, token, pre, du);
    const float factor = inverse_rms(sum_of_squares(du, a.width), a.width, a.rms_eps);
    Lanes dots = zeros();
    for (std::int64_t i = 0; i < a.width; i += lanes) {
      const Lanes unit = mul(load_at(du, i, a.width), all(factor)), grad = load_at(dy, i, a.width);
      store_at(dnorm, i, a.width, fma(grad, unit, load_at(dnorm, i, a.width)));
      dots = fma(mul(grad, load_at(a.norm, i, a.width)), unit, dots);
    }
    const Lanes mean = all(sum(dots) / static_cast<float>(a.width));
    for (std::int64_t i = 0; i < a.width; i += lanes) {
      const Lanes unit = mul(load_at(du, i, a.width), all(factor));
      const Lanes grad = mul(load_at(dy, i, a.width), load_at(a.norm, i, a.width));
      store_at(du, i, a.width, mul(sub(grad, mul(unit, mean)), all(factor)));
    }
  }
  for (std::int64_t j = 0; j < a.streams; ++j) {
    Lanes dots = zeros();
    for (std::int64_t i = 0; i < a.width; i += lanes)
      dots = fma(load_at(x + j * a.width, i, a.width), load_at(du, i, a.width), dots);
    dpre[j] = sum(dots);
  }
}

// Sixteen tokens' numbers side by side, and back.
inline Lanes gather(const float* from, std::int64_t stride, std::int64_t count) {
  float column[lanes] = {};
  for (std::int64_t t = 0; t < count; ++t) column[t] = from[t * stride];
  return load(column);
}
inline void scatter(Lanes value, float* to, std::int64_t stride, std::int64_t count) {
  float column[lanes];
  store(column, value);
  for (std::int64_t t = 0; t < count; ++t) to[t * stride] = column[t];
}

// Vectors at i: all sixteen values, or what is left of `count`.
template <bool whole>
inline Lanes load_part(const float* x, std::int64_t i, std::int64_t count) {
  if constexpr (whole) return load(x + i);
  else return load_at(x, i, count);
}
template <bool whole>
inline void store_part(float* x, std::int64_t i, std::int64_t count, Lanes value) {
  if constexpr (whole) store(x + i, value);
  else store_at(x, i, count, value);
}

// R tokens' gradients of V vectors of one stream.
template <int R, int V, bool whole>
inline void dx_tile(const EnterBackwardArgs& a, std::int64_t token, std::int64_t stream, std::int64_t i,
                    const float* du, const float (*pre)[most_gates], const float* share, const float* products) {
  const std::int64_t width = a.streams * a.width, gates = a.gates();
  const std::int64_t at = token * width + stream * a.width;
  Lanes sums[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const std::int64_t column = i + v * lanes;
      sums[r][v] = fma(load_part<whole>(du + r * a.width, column, a.width), all(pre[r][stream]),
                       mul(load_part<whole>(a.x + at + r * width, column, a.width), all(share[r])));
    }
  for (std::int64_t g = 0; g < gates; ++g) {
    const float* fn = a.fn + g * width + stream * a.width;
    Lanes row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load_part<whole>(fn, i + v * lanes, a.width);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes factor = all(products[r * gates + g]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store_part<whole>(a.dx + at + r * width, i + v * lanes, a.width, sums[r][v]);
}

template <int R>
inline void dx_tokens_of(const EnterBackwardArgs& a, std::int64_t token, const float* du,
                         const float (*pre)[most_gates], const float* share, const float* products) {
  for (std::int64_t stream = 0; stream < a.streams; ++stream) {
    std::int64_t i = 0;
    for (; i + tile_vectors * lanes <= a.width; i += tile_vectors * lanes)
      dx_tile<R, tile_vectors, true>(a, token, stream, i, du, pre, share, products);
    for (; i < a.width; i += lanes) dx_tile<R, 1, false>(a, token, stream, i, du, pre, share, products);
  }
}

// Products of some tokens with G gates and V vectors, added to fn's gradient.
template <int G, int V, bool whole>
inline void dfn_tile(const Site& a, const float* x, const float* products, std::int64_t count, std::int64_t gate,
                     std::int64_t i, float* dfn) {
  const std::int64_t width = a.streams * a.width, gates = a.gates();
  Lanes sums[G][V];
  float* to = dfn + gate * width;
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[g][v] = load_part<whole>(to + g * width, i + v * lanes, width);
  for (std::int64_t t = 0; t < count; ++t) {
    Lanes value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load_part<whole>(x + t * width, i + v * lanes, width);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Lanes factor = all(products[t * gates + gate + g]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[g][v] = fma(factor, value[v], sums[g][v]);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_part<whole>(to + g * width, i + v * lanes, width, sums[g][v]);
}

template <int V, bool whole>
inline void dfn_columns(const Site& a, const float* x, const float* products, std::int64_t count, std::int64_t i,
                        float* dfn) {
  std::int64_t gate = 0;
  for (; gate + dfn_gates <= a.gates(); gate += dfn_gates)
    dfn_tile<dfn_gates, V, whole>(a, x, products, count, gate, i, dfn);
  for (; gate < a.gates(); ++gate) dfn_tile<1, V, whole>(a, x, products, count, gate, i, dfn);
}

// `sums` are those of the task.
void block_backward(const EnterBackwardArgs& a, std::int64_t block, const Sums& at, float* sums) {
  const std::int64_t first = block * block_tokens;
  const std::int64_t count = a.tokens - first < block_tokens ? a.tokens - first : block_tokens;
  const std::int64_t gates = a.gates(), width = a.streams * a.width;
  const int n = static_cast<int>(a.streams);
  const Lanes eps = all(a.eps), one = all(1.0f);
  alignas(64) float values[block_tokens][most_gates], pre[block_tokens][most_gates], dpre[block_tokens][most_streams];
  float factors[block_tokens] = {};
  project(a, first, count, values, factors);

  // the gates again, all tokens side by side; half: what the sigmoids gave
  Lanes side[most_gates], grad[most_gates], half[2 * most_streams];
  for (std::int64_t g = 0; g < gates; ++g) side[g] = gather(&values[0][g], most_gates, count);
  const std::int64_t halves = a.mixed ? 2 * n : n;
  for (std::int64_t j = 0; j < halves; ++j)
    half[j] = sigmoid(fma(side[j], all(a.scale[j / n]), all(a.base[j])));
  for (int j = 0; j < n; ++j) scatter(add(half[j], eps), &pre[0][j], most_gates, count);

  Buffer<float> du(count * a.width);
  for (std::int64_t t = 0; t < count; ++t)
    collapse_backward(a, first + t, pre[t], &du[t * a.width], dpre[t], sums + at.norm);

  for (int j = 0; j < n; ++j) grad[j] = mul(gather(&dpre[0][j], most_streams, count), mul(half[j], sub(one, half[j])));
  if (a.mixed) {
    for (int j = 0; j < n; ++j) {
      const Lanes slope = mul(half[n + j], sub(one, half[n + j]));
      grad[n + j] = mul(gather(a.dpost + first * n + j, n, count), add(slope, slope));
    }
    const std::int64_t size = n * n;
    Lanes* dmix = grad + 2 * n;
    Lanes mix[most_streams * most_streams];
    Buffer<Lanes> kept(kept_of(n, a.iterations));
    for (std::int64_t i = 0; i < size; ++i) {
      mix[i] = fma(side[2 * n + i], all(a.scale[2]), all(a.base[2 * n + i]));
      dmix[i] = gather(a.dmix + first * size + i, size, count);
    }
    if (n == 4) {
      normalise<true>(mix, 4, a.iterations, eps, &kept[0]);
      normalise_backward(dmix, 4, a.iterations, &kept[0]);
    } else {
      normalise<true>(mix, n, a.iterations, eps, &kept[0]);
      normalise_backward(dmix, n, a.iterations, &kept[0]);
    }
  }

  // to the projections and to the root mean square that divides them
  Lanes scales[3] = {zeros(), zeros(), zeros()}, shares = zeros();
  const Lanes factor = gather(factors, 1, count);
  float products[block_tokens * most_gates];
  for (std::int64_t g = 0; g < gates; ++g) {
    const std::int64_t kind = g < n ? 0 : g < 2 * n ? 1 : 2;
    const Lanes product = mul(grad[g], side[g]);
    sums[at.base + g] += sum(grad[g]);
    scales[kind] = add(scales[kind], product);
    shares = fma(product, all(a.scale[kind]), shares);
    scatter(mul(mul(grad[g], all(a.scale[kind])), factor), products + g, gates, count);
  }
  for (int kind = 0; kind < 3; ++kind) sums[at.scale + kind] += sum(scales[kind]);
  float share[block_tokens];
  store(share, mul(mul(shares, mul(factor, factor)), all(-1.0f / static_cast<float>(width))));

  std::int64_t t = 0;
  for (; t + dx_tokens <= count; t += dx_tokens)
    dx_tokens_of<dx_tokens>(a, first + t, &du[t * a.width], pre + t, share + t, products + t * gates);
  for (; t < count; ++t) dx_tokens_of<1>(a, first + t, &du[t * a.width], pre + t, share + t, products + t * gates);

  std::int64_t i = 0;
  const float* x = a.x + first * width;
  for (; i + tile_vectors * lanes <= width; i += tile_vectors * lanes)
    dfn_columns<tile_vectors, true>(a, x, products, count, i, sums + at.fn);
  for (; i < width; i += lanes) dfn_columns<1, false>(a, x, products, count, i, sums + at.fn);
}

}  // namespace

void enter_backward(const EnterBackwardArgs& a) {
  const std::int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  const std::int64_t tasks = (blocks + chunk_blocks - 1) / chunk_blocks;
  Sums sums(a, tasks);
  if (tasks > 0)
    parallel(tasks, [&](std::int64_t task) {
      float* own = &sums.parts[task * sums.size];
      std::memset(own, 0, static_cast<std::size_t>(sums.size) * sizeof(float));
      const std::int64_t stop = (task + 1) * chunk_blocks < blocks ? (task + 1) * chunk_blocks : blocks;
      for (std::int64_t block = task * chunk_blocks; block < stop; ++block) block_backward(a, block, sums, own);
    });
  // tasks in their order, some numbers at a time
  const auto add_up = [&](std::int64_t place, std::int64_t count, float* to) {
    constexpr std::int64_t step = 1 << 12;
    parallel((count + step - 1) / step, [&](std::int64_t piece) {
      const std::int64_t stop = (piece + 1) * step < count ? (piece + 1) * step : count;
      for (std::int64_t i = piece * step; i < stop; i += lanes) {
        Lanes total = zeros();
        for (std::int64_t task = 0; task < tasks; ++task)
          total = add(total, load_at(&sums.parts[task * sums.size + place], i, count));
        store_at(to, i, count, total);
      }
    });
  };
  add_up(sums.fn, a.gates() * a.streams * a.width, a.dfn);
  add_up(sums.base, a.gates(), a.dbase);
  add_up(sums.scale, a.mixed ? 3 : 1, a.dscale);
  if (a.norm != nullptr) add_up(sums.norm, a.width, a.dnorm);
}

}  // namespace abyssal::ABYSSAL_ISA
