#include "ops/index_topk.hpp"

#include "ops/index_fp4.hpp"
#include "ops/top.hpp"
#include "ops/unpack_row.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/transpose.hpp"

namespace abyssal::ABYSSAL_ISA {
struct Here {};
}  // namespace abyssal::ABYSSAL_ISA

// placement without <new>, in the variant's own type
inline void* operator new(std::size_t, void* place, abyssal::ABYSSAL_ISA::Here) noexcept { return place; }

namespace abyssal::ABYSSAL_ISA {

namespace {

// Keys stand in lanes, so that a score is computed alike wherever its block and its query stand. What fits into the
// registers: heads, and vectors of keys.
#if ABYSSAL_ISA_avx512
constexpr int tile_heads = 4, vectors = 3, side_by_side_keys = 8;
#else
constexpr int tile_heads = 2, vectors = 2, side_by_side_keys = 4;
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

// Sixteen keys from a block on, which is a multiple of sixteen; the row of zeros behind the last.
inline void find_rows(const IndexTopkArgs& a, std::int64_t sequence, std::int64_t first, std::int64_t stop,
                      float* spare, const float** rows) {
  const bool together = a.pages.per_page % lanes == 0;  // they lie in one page
  const std::int64_t start = first < stop ? row_of_block(a.pages, sequence, first) : 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const std::int64_t block = first + lane;
    const std::int64_t row = block >= stop ? 0 : together ? start + lane : row_of_block(a.pages, sequence, block);
    rows[lane] = row_of(a.keys, row, spare + (spare == nullptr ? 0 : lane * a.keys.dim));
  }
}

// Pages are read once and rarely follow each other for long: ask for the sixteen keys that come next.
inline void fetch(const IndexTopkArgs& a, std::int64_t sequence, std::int64_t first, std::int64_t stop) {
  if (first >= stop) return;
  const std::uint8_t* next = a.keys.data + row_of_block(a.pages, sequence, first) * a.keys.bytes;
  for (std::int64_t line = 0; line < lanes * a.keys.bytes; line += 64) __builtin_prefetch(next + line);
}

struct Keys {
  const IndexTopkArgs& a;
  Buffer<float> tile, spare;

  explicit Keys(const IndexTopkArgs& args)
      : a(args), tile(args.keys.dim * tile_keys), spare(args.keys.stored == Stored::float32 ? 0 : lanes * args.keys.dim) {}

  // Keys of blocks first, first + 1, ... with keys in lanes.
  void read(std::int64_t sequence, std::int64_t first, std::int64_t stop) {
    for (int v = 0; v < vectors; ++v) {
      const float* rows[lanes];
      find_rows(a, sequence, first + v * lanes, stop, spare.size() > 0 ? &spare[0] : nullptr, rows);
      transpose_all(rows, a.keys.dim, &tile[v * lanes], tile_keys);
    }
  }
};

// The products of one query: to turn all keys would take longer than what is saved, so heads stand in lanes and the
// products are turned. The sums are the same.
struct OneQuery {
  const IndexTopkArgs& a;
  const float* weights;
  std::int64_t blocks;    // of sixteen heads
  Buffer<float> q, spare;  // q: [blocks, dim, lanes]

  OneQuery(const IndexTopkArgs& args, std::int64_t query)
      : a(args), weights(args.weights + query * args.heads), blocks((args.heads + lanes - 1) / lanes),
        q(blocks * args.keys.dim * lanes), spare(args.keys.stored == Stored::float32 ? 0 : lanes * args.keys.dim) {
    const std::int64_t dim = a.keys.dim;
    for (std::int64_t h = 0; h < blocks * lanes; ++h)
      for (std::int64_t j = 0; j < dim; ++j)
        q[(h / lanes * dim + j) * lanes + h % lanes] = h < a.heads ? a.q[(query * a.heads + h) * dim + j] : 0.0f;
  }

  template <int K>
  void products(const float* const* rows, const float* heads, float* to) const {
    Lanes total[K];
    for (std::int64_t first = 0; first < a.keys.dim; first += group) {
      Lanes sums[K];
      for (int k = 0; k < K; ++k) sums[k] = zeros();
      const std::int64_t stop = first + group < a.keys.dim ? first + group : a.keys.dim;
      for (std::int64_t j = first; j < stop; ++j) {
        const Lanes head = load(heads + j * lanes);
        for (int k = 0; k < K; ++k) sums[k] = fma(head, all(rows[k][j]), sums[k]);
      }
      for (int k = 0; k < K; ++k) total[k] = first == 0 ? sums[k] : add(total[k], sums[k]);
    }
    for (int k = 0; k < K; ++k) store(to + k * lanes, total[k]);
  }

  // Scores of sixteen blocks; of the row of zeros behind the last.
  Lanes scores(std::int64_t sequence, std::int64_t first, std::int64_t stop) {
    const float* rows[lanes];
    find_rows(a, sequence, first, stop, spare.size() > 0 ? &spare[0] : nullptr, rows);
    fetch(a, sequence, first + 4 * lanes, stop);
    alignas(64) float dots[lanes * lanes], turned[lanes * lanes];
    const float* of_key[lanes];
    for (int lane = 0; lane < lanes; ++lane) of_key[lane] = dots + lane * lanes;
    Lanes sums = zeros();
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (int k = 0; k < lanes; k += side_by_side_keys)
        products<side_by_side_keys>(rows + k, &q[b * a.keys.dim * lanes], dots + k * lanes);
      transpose(of_key, 0, turned, lanes);
      for (std::int64_t h = b * lanes; h < (b + 1) * lanes && h < a.heads; ++h)
        sums = fma(all(weights[h]), larger(zeros(), load(turned + h % lanes * lanes)), sums);
    }
    return sums;
  }
};

// Some queries of one sequence against some of its keys.
struct Task {
  std::int64_t sequence, query, queries, first, stop;
};

#if ABYSSAL_ISA_avx512
// The task by integers. False: it is not made for it, and nothing has been done.
bool run_whole(const IndexTopkArgs& a, const Task& task, std::int64_t* memory, std::int64_t* counts) {
  if (a.keys.stored != Stored::key || a.keys.dim % group != 0 || a.keys.dim > most_whole_dim ||
      a.pages.per_page % lanes != 0)
    return false;
  // each is begun where it is used, and ended behind the loop
  Buffer<QueryBytes> queries(task.queries);
  std::int64_t made = 0;
  bool fits = true;
  while (made < task.queries && fits) {
    new (&queries[made], Here{}) QueryBytes(a, task.query + made);
    fits = queries[made++].fits();
  }
  Buffer<OneQuery> others(task.queries);  // for keys that do not fit; begun with the first of them
  bool other = false;
  Buffer<Top> tops(task.queries);
  for (std::int64_t i = 0; i < task.queries; ++i) tops[i] = Top(memory + i * Top::room(a.k), a.k);
  KeyBytes<vectors> keys(a.keys.dim);
  for (std::int64_t first = task.first; first < task.stop && fits; first += tile_keys) {
    bool whole[vectors];
    for (int v = 0; v < vectors; ++v) {
      fetch(a, task.sequence, first + 2 * tile_keys + v * lanes, task.stop);
      // what lies behind the last block is not used, but must be such numbers
      const std::int64_t begin = first + v * lanes < task.stop ? first + v * lanes : first;
      const std::uint8_t* start = a.keys.data + row_of_block(a.pages, task.sequence, begin) * a.keys.bytes;
      const std::uint8_t* rows[lanes];
      for (int lane = 0; lane < lanes; ++lane) rows[lane] = start + (begin + lane < task.stop ? lane : 0) * a.keys.bytes;
      whole[v] = keys.read(v, rows);
      for (std::int64_t i = 0; i < task.queries && !whole[v] && !other; ++i)
        new (&others[i], Here{}) OneQuery(a, task.query + i);
      other = other || !whole[v];
    }
    for (std::int64_t i = 0; i < task.queries; ++i) {
      const std::int64_t visible = a.visible[task.query + i];
      std::int64_t here = (visible < task.stop ? visible : task.stop) - first;
      if (here <= 0 || visible <= a.k) continue;
      Lanes scores[vectors];
      queries[i].scores(keys, scores);
      for (int v = 0; v < vectors && here > 0; ++v, here -= lanes) {
        const std::int64_t begin = first + v * lanes;
        if (!whole[v]) scores[v] = others[i].scores(task.sequence, begin, task.stop);
        tops[i].add(scores[v], here < lanes ? static_cast<int>(here) : lanes, begin);
      }
    }
  }
  for (std::int64_t i = 0; i < task.queries; ++i) {
    if (fits) counts[i] = tops[i].shrink();
    if (i < made) queries[i].~QueryBytes();
    if (other) others[i].~OneQuery();
  }
  return fits;
}
#endif

void run_task(const IndexTopkArgs& a, const Task& task, std::int64_t* memory, std::int64_t* counts) {
#if ABYSSAL_ISA_avx512
  if (run_whole(a, task, memory, counts)) return;
#endif
  const std::int64_t dim = a.keys.dim, room = Top::room(a.k);
  if (task.queries == 1) {
    OneQuery one(a, task.query);
    Top top(memory, a.k);
    for (std::int64_t first = task.first; first < task.stop; first += lanes) {
      const std::int64_t here = task.stop - first;
      top.add(one.scores(task.sequence, first, task.stop), here < lanes ? static_cast<int>(here) : lanes, first);
    }
    counts[0] = top.shrink();
    return;
  }
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
