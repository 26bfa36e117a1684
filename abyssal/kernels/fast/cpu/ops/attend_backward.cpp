#include "ops/attend_list.hpp"
#include "ops/softmax_tile.hpp"
#include "parallel.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

// A task is a piece of a sequence: some queries, one after another. It adds to entries of its own; those of a
// sequence's pieces are added in their order. Where pieces begin depends on the sequence's length alone.
constexpr std::int64_t least_queries = 64, most_pieces = 16;

#if ABYSSAL_ISA_avx512
constexpr int spread_heads = 4, spread_vectors = 3;
#else
constexpr int spread_heads = 2, spread_vectors = 1;
#endif

struct Piece {
  std::int64_t sequence, first, stop;  // tokens
  std::int64_t oldest, near, far;      // the position of the first window entry, window entries, blocks
  std::int64_t at;                     // where its entries' gradients begin, in rows
};

std::int64_t piece_queries(std::int64_t length) {
  const std::int64_t queries = (length + most_pieces - 1) / most_pieces;
  return queries < least_queries ? least_queries : queries;
}

Piece piece_of(const AttendArgs& a, std::int64_t g, std::int64_t first) {
  const Span& span = a.spans[g];
  const std::int64_t stop = first + piece_queries(span.length), end = span.first + span.length;
  Piece p{g, first, stop < end ? stop : end, 0, 0, 0, 0};
  const List begin(a, g, first), last(a, g, p.stop - 1);
  p.oldest = begin.oldest;
  p.near = last.position - begin.oldest + 1;
  p.far = last.far;
  if (a.ratio > 0 && a.blocks != nullptr) {
    p.far = 0;
    for (std::int64_t i = first * a.k; i < p.stop * a.k; ++i)
      if (a.blocks[i] >= p.far) p.far = a.blocks[i] + 1;
  }
  return p;
}

// One query's numbers: [heads, stride] or [heads, padded], where `padded` are its entries in whole tiles.
struct Query {
  std::int64_t heads, stride, padded;
  Buffer<float> q, grad, dq;        // prepared; gradients of the result and of the prepared query
  Buffer<float> weights, dweights;  // softmax and the gradient of its logits
  Buffer<const float*> rows;        // entries
  Buffer<float*> drows;             // where their gradients are added
  Buffer<float> space;              // entries filled up to `stride`

  Query(const AttendArgs& a, std::int64_t row, std::int64_t entries)
      : heads(a.heads), stride(row), padded((entries + tile_entries - 1) / tile_entries * tile_entries),
        q(heads * stride), grad(heads * stride), dq(heads * stride), weights(heads * padded),
        dweights(heads * padded), rows(padded), drows(padded), space(a.dim == stride ? 0 : padded * stride) {}
};

// Gradients of V vectors of `count` entries from R heads.
template <int R, int V>
inline void spread(const Query& of, std::int64_t head, std::int64_t count, std::int64_t column) {
  Lanes q[R][V], grad[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const std::int64_t at = (head + r) * of.stride + column + v * lanes;
      q[r][v] = load(&of.q[at]);
      grad[r][v] = load(&of.grad[at]);
    }
  const float *weights = &of.weights[head * of.padded], *dweights = &of.dweights[head * of.padded];
  for (std::int64_t i = 0; i < count; ++i) {
    float* to = of.drows[i] + column;
    Lanes sums[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] = load(to + v * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes weight = all(weights[r * of.padded + i]), dweight = all(dweights[r * of.padded + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[v] = fma(dweight, q[r][v], fma(weight, grad[r][v], sums[v]));
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(to + v * lanes, sums[v]);
  }
}

template <int R>
inline void spread_heads_of(const Query& of, std::int64_t head, std::int64_t count) {
  std::int64_t column = 0;
  for (; column + spread_vectors * lanes <= of.stride; column += spread_vectors * lanes)
    spread<R, spread_vectors>(of, head, count, column);
  for (; column < of.stride; column += lanes) spread<R, 1>(of, head, count, column);
}

// R heads' products with a tile's entries, to `padded` numbers a head.
template <int R>
inline void products_of(const float* q, const Tile& tile, float* to, std::int64_t padded) {
  alignas(64) float logits[R * tile_entries];
  const int used = (tile.here + lanes - 1) / lanes;
  int vector = 0;
  for (; vector + vectors_at_once <= used; vector += vectors_at_once)
    products<R, vectors_at_once>(q, tile, 0, tile.stride, vector, logits);
  for (; vector < used; ++vector) products<R, 1>(q, tile, 0, tile.stride, vector, logits);
  for (int r = 0; r < R; ++r)
    std::memcpy(to + r * padded, logits + r * tile_entries, static_cast<std::size_t>(used * lanes) * sizeof(float));
}

// R heads' weighted sums of a tile's entries, added to dq.
template <int R>
inline void mix_of(const Tile& tile, const float* dweights, std::int64_t padded, float* dq) {
  alignas(64) float weights[R * tile_entries];
  float ones[R];
  for (int r = 0; r < R; ++r) {
    ones[r] = 1.0f;
    std::memcpy(weights + r * tile_entries, dweights + r * padded,
                static_cast<std::size_t>(tile.here) * sizeof(float));
  }
  std::int64_t column = 0;
  for (; column + vectors_at_once * lanes <= tile.stride; column += vectors_at_once * lanes)
    mix<R, vectors_at_once>(tile, weights, ones, column, dq);
  for (; column < tile.stride; column += lanes) mix<R, 1>(tile, weights, ones, column, dq);
}

void set_tile(const Query& of, std::int64_t first, std::int64_t count, Tile& tile) {
  tile.here = count - first < tile_entries ? static_cast<int>(count - first) : tile_entries;
  for (int i = 0; i < tile.here; ++i) tile.rows[i] = of.rows[first + i];
}

// The gradient of a head's query as it was projected: back through scale, rotation and normalisation.
void finish_query(const AttendArgs& a, std::int64_t token, std::int64_t head, float* grad, float* to) {
  const float* q = a.q + (token * a.heads + head) * a.dim;
  turn_pairs<true>(grad + a.dim - a.rotated, a.turn + token * a.rotated, a.rotated / 2);
  Lanes squares = zeros(), dots = zeros();
  for (std::int64_t c = 0; c < a.dim; c += lanes) {
    const Lanes value = load_at(q, c, a.dim);
    squares = fma(value, value, squares);
    dots = fma(value, load_at(grad, c, a.dim), dots);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.dim) + a.eps);
  const Lanes share = all(sum(dots) / static_cast<float>(a.dim) * factor * factor);
  for (std::int64_t c = 0; c < a.dim; c += lanes) {
    const Lanes value = load_at(q, c, a.dim);
    store_at(to, c, a.dim, mul(sub(load_at(grad, c, a.dim), mul(value, share)), all(factor * a.scale)));
  }
}

void query_backward(const AttendBackwardArgs& b, const List& list, const Piece& piece, float* drows, float* dsink,
                    Query& of, Tile& tile) {
  const AttendArgs& a = b.of;
  const std::int64_t count = list.count(), stride = of.stride, padded = of.padded, token = list.token;
  const float* turn = a.turn + token * a.rotated;
  prepare(a, token, 0, a.heads, stride, &of.q[0]);
  for (std::int64_t h = 0; h < a.heads; ++h) {
    float* grad = &of.grad[h * stride];
    std::memcpy(grad, b.dout + (token * a.heads + h) * a.dim, static_cast<std::size_t>(a.dim) * sizeof(float));
    for (std::int64_t c = a.dim; c < stride; ++c) grad[c] = 0.0f;
    turn_pairs<false>(grad + a.dim - a.rotated, turn, a.rotated / 2);
  }
  std::memset(&of.dq[0], 0, static_cast<std::size_t>(a.heads * stride) * sizeof(float));
  for (std::int64_t i = 0; i < count; ++i) {
    const float* row = list.row(i, nullptr);
    if (a.dim != stride) {
      float* space = &of.space[i * stride];
      std::memcpy(space, row, static_cast<std::size_t>(a.dim) * sizeof(float));
      for (std::int64_t c = a.dim; c < stride; ++c) space[c] = 0.0f;
      row = space;
    }
    of.rows[i] = row;
    const std::int64_t place = i < list.near ? list.oldest - piece.oldest + i : piece.near + list.block(i);
    of.drows[i] = drows + place * stride;
  }

  for (std::int64_t first = 0; first < count; first += tile_entries) {
    set_tile(of, first, count, tile);
    tile.turn();
    std::int64_t h = 0;
    for (; h + heads_at_once <= a.heads; h += heads_at_once) {
      products_of<heads_at_once>(&of.q[h * stride], tile, &of.weights[h * padded + first], padded);
      products_of<heads_at_once>(&of.grad[h * stride], tile, &of.dweights[h * padded + first], padded);
    }
    for (; h < a.heads; ++h) {
      products_of<1>(&of.q[h * stride], tile, &of.weights[h * padded + first], padded);
      products_of<1>(&of.grad[h * stride], tile, &of.dweights[h * padded + first], padded);
    }
  }
  for (std::int64_t h = 0; h < a.heads; ++h) {
    float *weights = &of.weights[h * padded], *dweights = &of.dweights[h * padded];
    const float *out = a.out + (token * a.heads + h) * a.dim, *dout = b.dout + (token * a.heads + h) * a.dim;
    for (std::int64_t i = count; i < padded; ++i) weights[i] = -__builtin_inff(), dweights[i] = 0.0f;
    Lanes most = all(a.sink[h]), dots = zeros(), totals = zeros();
    for (std::int64_t i = 0; i < padded; i += lanes) most = larger(most, load(weights + i));
    const float seen = largest(most);
    for (std::int64_t c = 0; c < a.dim; c += lanes)
      dots = fma(load_at(out, c, a.dim), load_at(dout, c, a.dim), dots);
    for (std::int64_t i = 0; i < padded; i += lanes) {
      const Lanes weight = exp_falling(sub(load(weights + i), all(seen)));
      store(weights + i, weight);
      totals = add(totals, weight);
    }
    const float dot = sum(dots), own = exp_falling(a.sink[h] - seen), factor = 1.0f / (sum(totals) + own);
    for (std::int64_t i = 0; i < padded; i += lanes) {
      const Lanes weight = mul(load(weights + i), all(factor));
      store(weights + i, weight);
      store(dweights + i, mul(weight, sub(load(dweights + i), all(dot))));
    }
    dsink[h] -= own * factor * dot;
  }
  for (std::int64_t first = 0; first < count; first += tile_entries) {
    set_tile(of, first, count, tile);
    std::int64_t h = 0;
    for (; h + heads_at_once <= a.heads; h += heads_at_once)
      mix_of<heads_at_once>(tile, &of.dweights[h * padded + first], padded, &of.dq[h * stride]);
    for (; h < a.heads; ++h) mix_of<1>(tile, &of.dweights[h * padded + first], padded, &of.dq[h * stride]);
  }
  std::int64_t h = 0;
  for (; h + spread_heads <= a.heads; h += spread_heads) spread_heads_of<spread_heads>(of, h, count);
  for (; h < a.heads; ++h) spread_heads_of<1>(of, h, count);
  for (h = 0; h < a.heads; ++h)
    finish_query(a, token, h, &of.dq[h * stride], b.dq + (token * a.heads + h) * a.dim);
}

// to[0 .. dim) += from
inline void add_row(const float* from, std::int64_t dim, float* to) {
  for (std::int64_t c = 0; c < dim; c += lanes) store_at(to, c, dim, add(load_at(to, c, dim), load_at(from, c, dim)));
}

}  // namespace

void attend_backward(const AttendBackwardArgs& b) {
  const AttendArgs& a = b.of;
  const std::int64_t stride = (a.dim + lanes - 1) / lanes * lanes;
  std::int64_t count = 0, rows = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    const std::int64_t queries = piece_queries(a.spans[g].length);
    count += (a.spans[g].length + queries - 1) / queries;
  }
  Buffer<Piece> pieces(count);
  Buffer<std::int64_t> firsts(a.sequences + 1);  // pieces of each sequence
  count = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    firsts[g] = count;
    const std::int64_t stop = a.spans[g].first + a.spans[g].length;
    for (std::int64_t t = a.spans[g].first; t < stop; t = pieces[count++].stop) {
      pieces[count] = piece_of(a, g, t);
      pieces[count].at = rows;
      rows += pieces[count].near + pieces[count].far;
    }
  }
  if (a.sequences > 0) firsts[a.sequences] = count;
  for (std::int64_t h = 0; h < a.heads; ++h) b.dsink[h] = 0.0f;
  if (count == 0) return;

  Buffer<float> drows(rows * stride), dsinks(count * a.heads);
  parallel(count, [&](std::int64_t task) {
    const Piece& piece = pieces[task];
    float *own = &drows[piece.at * stride], *dsink = &dsinks[task * a.heads];
    std::memset(own, 0, static_cast<std::size_t>((piece.near + piece.far) * stride) * sizeof(float));
    std::memset(dsink, 0, static_cast<std::size_t>(a.heads) * sizeof(float));
    std::int64_t most = 0;
    for (std::int64_t t = piece.first; t < piece.stop; ++t) {
      const std::int64_t entries = List(a, piece.sequence, t).count();
      if (entries > most) most = entries;
    }
    Query of(a, stride, most);
    Tile tile(stride, 0);
    for (std::int64_t t = piece.first; t < piece.stop; ++t)
      query_backward(b, List(a, piece.sequence, t), piece, own, dsink, of, tile);
  });
  parallel(a.sequences, [&](std::int64_t g) {
    const Span& span = a.spans[g];
    for (std::int64_t i = firsts[g]; i < firsts[g + 1]; ++i) {
      const Piece& piece = pieces[i];
      for (std::int64_t n = 0; n < piece.near; ++n) {
        const std::int64_t position = piece.oldest + n;
        float* to = position >= span.start
                        ? b.dfresh + (span.first + position - span.start) * a.dim
                        : b.dring + (span.slot * a.ring_size + position % a.ring_size) * a.dim;
        add_row(&drows[(piece.at + n) * stride], a.dim, to);
      }
      for (std::int64_t n = 0; n < piece.far; ++n)
        add_row(&drows[(piece.at + piece.near + n) * stride], a.dim,
                b.dentries + row_of_block(a.pages, g, n) * a.dim);
    }
  });
  for (std::int64_t task = 0; task < count; ++task)
    for (std::int64_t h = 0; h < a.heads; ++h) b.dsink[h] += dsinks[task * a.heads + h];
}

}  // namespace abyssal::ABYSSAL_ISA
