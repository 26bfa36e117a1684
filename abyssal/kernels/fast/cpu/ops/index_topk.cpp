#include "ops/index_topk.hpp"

#include "ops/top.hpp"
#include "ops/unpack_row.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/transpose.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

// Keys stand in lanes, so that a score is computed alike wherever its block and its query stand. What fits into the
// registers: heads, and vectors of keys.
#if ABYSSAL_ISA_avx512
constexpr int tile_heads = 4, vectors = 3;
#else
constexpr int tile_heads = 2, vectors = 2;
#endif
constexpr int tile_keys = vectors * lanes;
constexpr int group = 32;                 // dimensions that are summed for themselves: those of one FP4 scale
constexpr std::int64_t side_by_side_queries = 16;
constexpr std::int64_t least_range = 2048;  // keys that are worth a task

// Products of R heads with the keys of a tile; then relu, weights and the sum over heads, one head after another.
template <int R>
inline void add_heads(const float* q, const float* weights, std::int64_t dim, const float* keys, Lanes* scores) {
  Lanes total[R][vectors];
  for (std::int64_t first = 0; first < dim; first += group) {
    Lanes sums[R][vectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < vectors; ++v) sums[r][v] = zeros();
    const std::int64_t stop = first + group < dim ? first + group : dim;
    for (std::int64_t j = first; j < stop; ++j) {
      Lanes key[vectors];
      for (int v = 0; v < vectors; ++v) key[v] = load(keys + j * tile_keys + v * lanes);
      for (int r = 0; r < R; ++r) {
        const Lanes factor = all(q[r * dim + j]);
        for (int v = 0; v < vectors; ++v) sums[r][v] = fma(factor, key[v], sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < vectors; ++v) total[r][v] = first == 0 ? sums[r][v] : add(total[r][v], sums[r][v]);
  }
  for (int r = 0; r < R; ++r)
    // in this order NaN stays
    for (int v = 0; v < vectors; ++v) scores[v] = fma(all(weights[r]), larger(zeros(), total[r][v]), scores[v]);
}

struct Keys {
  const IndexTopkArgs& a;
  Buffer<float> tile, spare;

  explicit Keys(const IndexTopkArgs& args)
      : a(args), tile(args.keys.dim * tile_keys), spare(args.keys.stored == Stored::float32 ? 0 : lanes * args.keys.dim) {}

  // Keys of blocks first, first + 1, ... with keys in lanes; the row of zeros behind the last.
  void read(std::int64_t sequence, std::int64_t first, std::int64_t stop) {
    const std::int64_t dim = a.keys.dim;
    for (int v = 0; v < vectors; ++v) {
      const float* rows[lanes];
      for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t block = first + v * lanes + lane;
        const std::int64_t row = block < stop ? row_of_block(a.pages, sequence, block) : 0;
        rows[lane] = row_of(a.keys, row, spare.size() > 0 ? &spare[lane * dim] : nullptr);
      }
      transpose_all(rows, dim, &tile[v * lanes], tile_keys);
    }
  }
};

// Some queries of one sequence against some of its keys.
struct Task {
  std::int64_t sequence, query, queries, first, stop;
};

void run_task(const IndexTopkArgs& a, const Task& task, std::int64_t* memory, std::int64_t* counts) {
  const std::int64_t dim = a.keys.dim, room = Top::room(a.k);
  Keys keys(a);
  Buffer<Top> tops(task.queries);
  for (std::int64_t i = 0; i < task.queries; ++i) tops[i] = Top(memory + i * room, a.k);
  for (std::int64_t first = task.first; first < task.stop; first += tile_keys) {
    keys.read(task.sequence, first, task.stop);
    for (std::int64_t i = 0; i < task.queries; ++i) {
      const std::int64_t query = task.query + i;
      std::int64_t here = (a.visible[query] < task.stop ? a.visible[query] : task.stop) - first;
      if (here <= 0 || a.visible[query] <= a.k) continue;
      const float* q = a.q + query * a.heads * dim;
      const float* weights = a.weights + query * a.heads;
      Lanes scores[vectors];
      for (int v = 0; v < vectors; ++v) scores[v] = zeros();
      std::int64_t h = 0;
      for (; h + tile_heads <= a.heads; h += tile_heads)
        add_heads<tile_heads>(q + h * dim, weights + h, dim, &keys.tile[0], scores);
      for (; h < a.heads; ++h) add_heads<1>(q + h * dim, weights + h, dim, &keys.tile[0], scores);
      for (int v = 0; v < vectors && here > 0; ++v, here -= lanes)
        tops[i].add(scores[v], here < lanes ? static_cast<int>(here) : lanes, first + v * lanes);
    }
  }
  for (std::int64_t i = 0; i < task.queries; ++i) counts[i] = tops[i].shrink();
}

}  // namespace

void index_topk(const IndexTopkArgs& a) {
  const std::int64_t queries = a.firsts[a.sequences], room = Top::room(a.k);
  if (queries == 0 || a.k == 0) return;
  // few queries: their keys are cut into ranges, so that every thread has work
  std::int64_t sets = 0, most = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    sets += (a.firsts[g + 1] - a.firsts[g] + side_by_side_queries - 1) / side_by_side_queries;
    for (std::int64_t t = a.firsts[g]; t < a.firsts[g + 1]; ++t) most = a.visible[t] > most ? a.visible[t] : most;
  }
  std::int64_t ranges = (4 * threads() + sets - 1) / sets;
  if (ranges > most / least_range) ranges = most / least_range;
  if (ranges < 1) ranges = 1;
  Buffer<Task> tasks(sets * ranges);
  std::int64_t count = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g)
    for (std::int64_t t = a.firsts[g]; t < a.firsts[g + 1]; t += side_by_side_queries) {
      const std::int64_t here = a.firsts[g + 1] - t < side_by_side_queries ? a.firsts[g + 1] - t : side_by_side_queries;
      std::int64_t seen = 0;
      for (std::int64_t i = 0; i < here; ++i) seen = a.visible[t + i] > seen ? a.visible[t + i] : seen;
      const std::int64_t tiles = seen <= a.k ? 0 : (seen + tile_keys - 1) / tile_keys;
      for (std::int64_t r = 0; r < ranges; ++r) {
        const std::int64_t stop = tiles * (r + 1) / ranges * tile_keys;
        tasks[count++] = {g, t, here, tiles * r / ranges * tile_keys, stop < seen ? stop : seen};
      }
    }
  Buffer<std::int64_t> ranks(queries * ranges * room), counts(queries * ranges);
  const bool alone = queries * a.heads * a.keys.dim * most < (1 << 18);
  parallel(
      count,
      [&](std::int64_t i) {
        const Task& task = tasks[i];
        // of one set of queries, range after range
        const std::int64_t place = task.query * ranges + i % ranges * task.queries;
        if (task.first < task.stop) run_task(a, task, &ranks[place * room], &counts[place]);
        else
          for (std::int64_t n = 0; n < task.queries; ++n) counts[place + n] = 0;
      },
      alone ? 1 : 0);
  parallel(
      sets,
      [&](std::int64_t set) {
        const Task& task = tasks[set * ranges];
        Buffer<std::int64_t> found(ranges * a.k);
        for (std::int64_t i = 0; i < task.queries; ++i) {
          std::int64_t* out = a.blocks + (task.query + i) * a.k;
          std::int64_t n = a.visible[task.query + i];
          if (n <= a.k) {
            for (std::int64_t b = 0; b < a.k; ++b) out[b] = b < n ? b : -1;
            continue;
          }
          n = 0;
          for (std::int64_t r = 0; r < ranges; ++r) {
            const std::int64_t place = task.query * ranges + r * task.queries + i;
            for (std::int64_t b = 0; b < counts[place]; ++b) found[n++] = ranks[place * room + b];
          }
          select(&found[0], n, a.k);
          for (std::int64_t b = 0; b < a.k; ++b) out[b] = block_of(found[b]);
          sort(out, a.k);
        }
      },
      alone ? 1 : 0);
}

}  // namespace abyssal::ABYSSAL_ISA
