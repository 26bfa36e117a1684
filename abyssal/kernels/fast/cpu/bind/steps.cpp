// The steps: sublayers that take one call (steps/). Each keeps the tensors of its weights alive.
#include <nanobind/nanobind.h>

#include "bind/expert_weights.hpp"
#include "bind/inside.hpp"
#include "bind/steps.hpp"
#include "steps/attention.hpp"
#include "steps/moe.hpp"

namespace abyssal {

namespace {

Array array_of(nb::handle object) { return nb::cast<Array>(object); }

const Factor& factor_of(nb::handle object, std::int64_t inputs, std::int64_t outputs, std::int64_t matrices = 1) {
  const Factor& found = nb::cast<const PackedWeight&>(object);
  if ((inputs >= 0 && found.weight.inputs != inputs) || (outputs >= 0 && found.weight.outputs != outputs) ||
      (matrices >= 0 && found.matrices != matrices))
    throw nb::value_error("a weight does not fit those beside it");
  return found;
}

// (fn, base, scale, norm, rms_eps, eps, iterations)
Site site_of(const nb::tuple& parts) {
  if (parts.size() != 7) throw nb::value_error("a site has seven parts");
  Site s{};
  const Array norm = array_of(parts[3]), fn = array_of(parts[0]);
  s.norm = norm.as<float>("norm", {-1});
  s.width = norm.shape[0];
  s.fn = fn.as<float>("fn", {-1, -1});
  s.streams = s.width > 0 ? fn.shape[1] / s.width : 0;
  if (s.streams < 1 || s.streams > most_streams) throw nb::value_error("1 to 8 streams");
  const std::int64_t rows = (2 + s.streams) * s.streams;
  fn.as<float>("fn", {rows, s.streams * s.width});
  s.base = array_of(parts[1]).as<float>("base", {rows});
  s.scale = array_of(parts[2]).as<float>("scale", {3});
  s.rms_eps = nb::cast<float>(parts[4]);
  s.eps = nb::cast<float>(parts[5]);
  s.iterations = nb::cast<int>(parts[6]);
  if (s.iterations < 1) throw nb::value_error("iterations must be positive");
  s.mixed = true;
  return s;
}

// (wkv, wgate, ape, norm)
CompressorWeights compressor_of(const nb::tuple& parts, std::int64_t width, std::int64_t rotated) {
  CompressorWeights c{};
  const Array ape = array_of(parts[2]), norm = array_of(parts[3]);
  c.ape = ape.as<float>("ape", {-1, -1});
  c.norm = norm.as<float>("norm", {-1});
  c.ratio = ape.shape[0];
  c.dim = norm.shape[0];
  c.overlap = ape.shape[1] != c.dim;
  if (c.dim < 1 || c.ratio < 1 || ape.shape[1] != c.width() || rotated > c.dim)
    throw nb::value_error("ape needs as many channels as norm, or twice");
  c.wkv = factor_of(parts[0], width, c.width());
  c.wgate = factor_of(parts[1], width, c.width());
  return c;
}

// (values, logits, ring_size, entries, per_page)
CompressedCache cache_of(const nb::tuple& parts, const CompressorWeights& c, bool key, std::int64_t rotated, bool exact,
                         const Array& tables, const AttentionPass& p) {
  CompressedCache cache{};
  const Array values = array_of(parts[0]), entries = array_of(parts[3]);
  cache.values = values.as<float>("values", {-1, c.width()});
  cache.logits = array_of(parts[1]).as<float>("logits", {values.shape[0], c.width()});
  cache.ring_size = nb::cast<std::int64_t>(parts[2]);
  cache.entries = rows_of("entries", entries, key ? Stored::key : Stored::entry, c.dim, key ? 0 : rotated);
  if (cache.entries.stored == Stored::bfloat16 || (exact && cache.entries.stored != Stored::float32))
    throw nb::value_error("entries are kept in another way");
  cache.pages = pages_of(tables, p.sequences, nb::cast<std::int64_t>(parts[4]));
  CompressArgs args{};
  args.ratio = c.ratio, args.ring_size = cache.ring_size, args.overlap = c.overlap;
  args.sequences = p.sequences, args.spans = p.spans, args.pages = cache.pages;
  if (!inside(args, p.tokens, values.shape[0], entries.shape[0], p.blocks))
    throw nb::value_error("spans, tables or block_turn do not fit the arrays");
  return cache;
}

class AttentionStep {
 public:
  AttentionStep(nb::tuple site, nb::tuple q, nb::tuple kv, nb::object sink, nb::tuple out, std::int64_t rotated,
                std::int64_t window, double softmax_scale, std::int64_t block, bool exact, nb::object compressor,
                nb::object index)
      : held_(nb::make_tuple(site, q, kv, sink, out, compressor, index)) {
    w_.site = site_of(site);
    const std::int64_t width = w_.site.width;
    w_.wq_a = factor_of(q[0], width, -1);
    const std::int64_t latent = w_.wq_a.weight.outputs;
    w_.q_norm = array_of(q[1]).as<float>("q_norm", {latent});
    w_.wkv = factor_of(kv[0], width, -1);
    w_.dim = w_.wkv.weight.outputs;
    w_.kv_norm = array_of(kv[1]).as<float>("kv_norm", {w_.dim});
    const Array sinks = array_of(sink);
    w_.sink = sinks.as<float>("sink", {-1});
    w_.heads = sinks.shape[0];
    w_.wq_b = factor_of(q[2], latent, w_.heads * w_.dim);
    w_.wo_a = factor_of(out[0], -1, -1, -1);
    if (w_.wo_a.matrices * w_.wo_a.weight.inputs != w_.heads * w_.dim) throw nb::value_error("wo_a does not fit");
    w_.wo_b = factor_of(out[1], w_.wo_a.matrices * w_.wo_a.weight.outputs, width);
    w_.rotated = rotated;
    w_.window = window;
    w_.softmax_scale = static_cast<float>(softmax_scale);
    w_.block = block;
    w_.exact = exact;
    if (rotated < 0 || rotated % 2 != 0 || rotated > w_.dim) throw nb::value_error("rotated values that cannot be");
    if (!compressor.is_none()) {
      compressor_ = compressor_of(nb::cast<nb::tuple>(compressor), width, rotated);
      if (compressor_.dim != w_.dim) throw nb::value_error("compressed entries of another size");
      w_.compressor = &compressor_;
    }
    if (!index.is_none()) {
      // (wq_b, weights_proj, keys, factor, exact)
      const auto parts = nb::cast<nb::tuple>(index);
      index_.keys = compressor_of(nb::cast<nb::tuple>(parts[2]), width, rotated);
      index_.weights_proj = factor_of(parts[1], width, -1);
      index_.wq_b = factor_of(parts[0], latent, index_.weights_proj.weight.outputs * index_.keys.dim);
      index_.factor = nb::cast<float>(parts[3]);
      index_.exact = nb::cast<bool>(parts[4]);
      if (w_.compressor == nullptr || index_.keys.ratio != compressor_.ratio ||
          (!index_.exact && (index_.keys.dim & (index_.keys.dim - 1)) != 0))
        throw nb::value_error("index keys that do not fit the compressor, or no power of two in size");
      w_.index = &index_;
    }
  }
  AttentionStep(const AttentionStep&) = delete;

  void run(const Array& streams, const Array& turn, const Array& spans, const Array& ring, std::int64_t ring_size,
           const Array& tables, const nb::object& compressed, const nb::object& keys, const nb::object& block_turn,
           const nb::object& firsts, const nb::object& visible, const nb::object& chosen, const Array& out) const {
    AttentionPass p{};
    p.streams = streams.as<float>("streams", {-1, w_.site.streams, w_.site.width});
    p.tokens = streams.shape[0];
    p.out = out.as<float>("out", {p.tokens, w_.site.streams, w_.site.width});
    p.turn = turn.complex("turn");
    if (2 * turn.size() != p.tokens * w_.rotated) throw nb::value_error("turn does not fit the tokens");
    p.spans = reinterpret_cast<const Span*>(spans.as<std::int64_t>("spans", {-1, 6}));
    p.sequences = spans.shape[0];
    p.ring = rows_of("ring", ring, Stored::entry, w_.dim, w_.rotated);
    p.ring_size = ring_size;
    if (p.ring.stored == Stored::bfloat16 || (w_.exact && p.ring.stored != Stored::float32))
      throw nb::value_error("window entries are kept in another way");
    AttendArgs near{};
    near.sequences = p.sequences, near.spans = p.spans, near.window = w_.window, near.ring_size = ring_size;
    if (!inside(near, p.tokens, ring.shape[0], 0)) throw nb::value_error("spans point outside of the ring");
    if (w_.compressor != nullptr) {
      const Array turns = array_of(block_turn);
      p.block_turn = turns.complex("block_turn");
      p.blocks = turns.shape[0];
      if (2 * turns.size() != p.blocks * w_.rotated) throw nb::value_error("block_turn does not fit");
      p.compressed = cache_of(nb::cast<nb::tuple>(compressed), *w_.compressor, false, w_.rotated, w_.exact, tables, p);
    }
    if (w_.index != nullptr) {
      p.index = cache_of(nb::cast<nb::tuple>(keys), w_.index->keys, true, w_.rotated, w_.index->exact, tables, p);
      if (!chosen.is_none()) {
        const Array blocks = array_of(chosen), list = array_of(firsts), seen = array_of(visible);
        p.chosen = blocks.as<std::int64_t>("chosen", {-1, -1});
        p.k = blocks.shape[1];
        p.firsts = list.as<std::int64_t>("firsts", {p.sequences + 1});
        p.visible = seen.as<std::int64_t>("visible", {blocks.shape[0]});
        IndexTopkArgs args{};
        args.sequences = p.sequences, args.firsts = p.firsts, args.visible = p.visible, args.pages = p.index.pages;
        const Span* last = p.sequences > 0 ? p.spans + p.sequences - 1 : nullptr;
        if (blocks.shape[0] > p.tokens || !inside(args, blocks.shape[0]) ||
            (last != nullptr && blocks.shape[0] < last->first + last->length))
          throw nb::value_error("firsts, visible or chosen do not fit the tokens");
      }
    }
    const nb::gil_scoped_release release;
    attention_step(kernels(), w_, p);
  }

 private:
  nb::object held_;
  AttentionWeights w_{};
  CompressorWeights compressor_{};
  IndexWeights index_{};
};

class MoeStep {
 public:
  MoeStep(nb::tuple site, const PackedWeight& gate, nb::object bias, nb::object table, std::int64_t k, double scale,
          nb::tuple routed, nb::object shared, double limit, std::int64_t block)
      : held_(nb::make_tuple(site, gate, bias, table, routed, shared)) {
    w_.site = site_of(site);
    w_.gate = gate;
    w_.routed = expert_weights(nb::cast<const PackedWeight&>(routed[0]), nb::cast<const PackedWeight&>(routed[1]),
                               nb::cast<const PackedWeight&>(routed[2]));
    w_.shared = shared_weights(shared, w_.routed);
    const std::int64_t experts = w_.routed.matrices;
    if (gate.matrices != 1 || gate.weight.inputs != w_.site.width || gate.weight.outputs != experts ||
        w_.routed.w1.inputs != w_.site.width || k < 0 || k > experts)
      throw nb::value_error("the gate does not fit the experts");
    if (!bias.is_none()) w_.bias = array_of(bias).as<float>("bias", {experts});
    if (!table.is_none()) {
      const Array rows = array_of(table);
      w_.table = rows.as<std::int64_t>("table", {-1, k});
      vocabulary_ = rows.shape[0];
      for (std::int64_t i = 0; i < vocabulary_ * k; ++i)
        if (w_.table[i] < 0 || w_.table[i] >= experts) throw nb::value_error("table names an expert that is none");
    }
    w_.k = k;
    w_.scale = static_cast<float>(scale);
    w_.limit = static_cast<float>(limit);
    w_.block = block;
  }

  void run(const Array& streams, const Array& ids, const Array& out) const {
    const float* from = streams.as<float>("streams", {-1, w_.site.streams, w_.site.width});
    const std::int64_t tokens = streams.shape[0];
    float* to = out.as<float>("out", {tokens, w_.site.streams, w_.site.width});
    const std::int64_t* list = ids.as<std::int64_t>("ids", {tokens});
    if (w_.table != nullptr)
      for (std::int64_t t = 0; t < tokens; ++t)
        if (list[t] < 0 || list[t] >= vocabulary_) throw nb::value_error("an id is outside of the table");
    const nb::gil_scoped_release release;
    moe_step(kernels(), w_, tokens, from, list, to);
  }

 private:
  nb::object held_;
  MoeWeights w_{};
  std::int64_t vocabulary_ = 0;
};

}  // namespace

void bind_steps(nb::module_& m) {
  nb::class_<AttentionStep>(m, "AttentionStep")
      .def(nb::init<nb::tuple, nb::tuple, nb::tuple, nb::object, nb::tuple, std::int64_t, std::int64_t, double,
                    std::int64_t, bool, nb::object, nb::object>(),
           nb::arg("site"), nb::arg("q"), nb::arg("kv"), nb::arg("sink"), nb::arg("out"), nb::arg("rotated"),
           nb::arg("window"), nb::arg("softmax_scale"), nb::arg("block"), nb::arg("exact"),
           nb::arg("compressor").none(), nb::arg("index").none())
      .def("__call__", &AttentionStep::run, nb::arg("streams"), nb::arg("turn"), nb::arg("spans"), nb::arg("ring"),
           nb::arg("ring_size"), nb::arg("tables"), nb::arg("compressed").none(), nb::arg("keys").none(),
           nb::arg("block_turn").none(), nb::arg("firsts").none(), nb::arg("visible").none(), nb::arg("chosen").none(),
           nb::arg("out"));
  nb::class_<MoeStep>(m, "MoeStep")
      .def(nb::init<nb::tuple, const PackedWeight&, nb::object, nb::object, std::int64_t, double, nb::tuple, nb::object,
                    double, std::int64_t>(),
           nb::arg("site"), nb::arg("gate"), nb::arg("bias").none(), nb::arg("table").none(), nb::arg("k"),
           nb::arg("scale"), nb::arg("routed"), nb::arg("shared").none(), nb::arg("limit"), nb::arg("block"))
      .def("__call__", &MoeStep::run, nb::arg("streams"), nb::arg("ids"), nb::arg("out"));
}

}  // namespace abyssal
