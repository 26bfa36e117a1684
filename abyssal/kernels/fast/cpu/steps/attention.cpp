#include "steps/attention.hpp"

#include <cstring>

#include "ops/compress.hpp"
#include "ops/encode.hpp"
#include "ops/index_topk.hpp"
#include "ops/norm.hpp"

namespace abyssal {

namespace {

// Where each block that the tokens complete is stored, -1 for those that are known already.
std::unique_ptr<std::int64_t[]> places_of(const AttentionPass& p, const Pages& pages, std::int64_t ratio) {
  std::unique_ptr<std::int64_t[]> places(new std::int64_t[static_cast<std::size_t>(p.blocks)]);
  std::int64_t count = 0;
  for (std::int64_t g = 0; g < p.sequences; ++g) {
    const Span& s = p.spans[g];
    for (std::int64_t b = s.start / ratio; b < (s.start + s.length) / ratio; ++b) {
      const std::int64_t page = pages.tables[g * pages.most + b / pages.per_page];
      places[count++] = (b + 1) * ratio > s.known ? 1 + page * pages.per_page + b % pages.per_page : -1;
    }
  }
  return places;
}

// Add the tokens to a compressor's rings and the blocks that they complete to its entries.
void remember(const Kernels& k, const AttentionWeights& w, const CompressorWeights& c, const AttentionPass& p,
              const CompressedCache& cache, const float* x, bool key, bool exact) {
  const Values values(p.tokens * c.width()), logits(p.tokens * c.width()), out(p.blocks * c.dim);
  c.wkv.multiply(k, x, p.tokens, values.get());
  c.wgate.multiply(k, x, p.tokens, logits.get());
  auto* data = const_cast<std::uint8_t*>(cache.entries.data);
  k.compress({p.sequences, p.spans, c.ratio, c.dim, c.overlap, values.get(), logits.get(), c.ape, cache.values,
              cache.logits, cache.ring_size, c.norm, w.site.rms_eps, w.rotated, p.block_turn,
              exact ? reinterpret_cast<float*>(data) : nullptr, cache.pages, out.get()});
  if (exact || p.blocks == 0) return;
  if (key) k.rounding({Rounding::hadamard, p.blocks, c.dim, 1, out.get(), out.get()});
  const auto places = places_of(p, cache.pages, c.ratio);
  k.encode({p.blocks, out.get(), key, cache.entries, data, places.get()});
}

void choose(const Kernels& k, const AttentionWeights& w, const AttentionPass& p, const float* latent, const float* x) {
  const IndexWeights& index = *w.index;
  const std::int64_t heads = index.weights_proj.weight.outputs, dim = index.keys.dim;
  const Values q(p.tokens * heads * dim), weights(p.tokens * heads);
  index.wq_b.multiply(k, latent, p.tokens, q.get());
  k.norm({p.tokens * heads, dim, q.get(), false, nullptr, 0.0f, p.turn, heads, w.rotated, false, q.get()});
  if (!index.exact) {
    k.rounding({Rounding::hadamard, p.tokens * heads, dim, 1, q.get(), q.get()});
    k.rounding({Rounding::float4, p.tokens * heads, dim, 32, q.get(), q.get()});
  }
  index.weights_proj.multiply(k, x, p.tokens, weights.get());
  for (std::int64_t i = 0; i < p.tokens * heads; ++i) weights.get()[i] *= index.factor;
  k.index_topk({p.sequences, p.firsts, heads, p.k, q.get(), weights.get(), p.visible, p.index.entries, p.index.pages,
                p.chosen});
}

}  // namespace

void attention_step(const Kernels& k, const AttentionWeights& w, const AttentionPass& p) {
  const std::int64_t T = p.tokens, D = w.site.width, Q = w.wq_a.weight.outputs, H = w.heads, C = w.dim;
  const Entered entered(k, w.site, p.streams, T);
  const Rounded input(k, entered.x.get(), T, D, w.block);
  const Values latent(T * Q), q(T * H * C), kv(T * C), o(T * H * C);
  w.wq_a.multiply(k, input.get(), T, latent.get());
  k.norm({T, Q, latent.get(), true, w.q_norm, w.site.rms_eps, nullptr, 1, 0, false, latent.get()});
  const Rounded query(k, latent.get(), T, Q, w.block);
  w.wq_b.multiply(k, query.get(), T, q.get());
  w.wkv.multiply(k, input.get(), T, kv.get());
  k.norm({T, C, kv.get(), true, w.kv_norm, w.site.rms_eps, p.turn, 1, w.rotated, false, kv.get()});

  AttendArgs a{};
  a.fresh = p.ring;
  const Values stored(w.exact ? 0 : (T * p.ring.bytes + 3) / 4);
  auto* fresh = reinterpret_cast<std::uint8_t*>(w.exact ? kv.get() : stored.get());
  a.fresh.data = fresh;
  if (!w.exact) k.encode({T, kv.get(), false, a.fresh, fresh, nullptr});
  if (w.compressor != nullptr) {
    remember(k, w, *w.compressor, p, p.compressed, entered.x.get(), false, w.exact);
    a.ratio = w.compressor->ratio;
    a.entries = p.compressed.entries;
    a.pages = p.compressed.pages;
    if (w.index != nullptr) {
      // keys first: a query sees the block that its own token completes
      remember(k, w, w.index->keys, p, p.index, entered.x.get(), true, w.index->exact);
      if (p.chosen != nullptr) choose(k, w, p, query.get(), entered.x.get());
      a.blocks = p.chosen;
      a.k = p.k;
    }
  }
  a.sequences = p.sequences, a.spans = p.spans;
  a.heads = H, a.dim = C, a.rotated = w.rotated;
  a.q = q.get(), a.turn = p.turn, a.sink = w.sink, a.out = o.get();
  a.eps = w.site.rms_eps;
  a.scale = w.softmax_scale;
  a.window = w.window, a.ring = p.ring, a.ring_size = p.ring_size;
  a.kept = true;
  k.attend(a);
  // rows of nobody
  const std::int64_t used = p.sequences == 0 ? 0 : p.spans[p.sequences - 1].first + p.spans[p.sequences - 1].length;
  std::memset(o.get() + used * H * C, 0, static_cast<std::size_t>((T - used) * H * C) * sizeof(float));

  const std::int64_t inner = w.wo_a.matrices * w.wo_a.weight.outputs;
  const Values low(T * inner), y(T * D);
  w.wo_a.multiply(k, o.get(), T, low.get(), true);
  const Rounded output(k, low.get(), T, inner, w.block);
  w.wo_b.multiply(k, output.get(), T, y.get());
  entered.leave(k, w.site, y.get(), p.streams, T, p.out);
}

}  // namespace abyssal
