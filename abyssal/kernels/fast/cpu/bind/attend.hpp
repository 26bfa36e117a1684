// Arguments of attention and of its way back.
#pragma once

#include <nanobind/stl/optional.h>

#include <optional>

#include "bind/inside.hpp"

namespace abyssal {

inline AttendArgs attend_args(const Array& q, const Array& turn, const Array& sink, float eps, float scale,
                              const Array& spans, const Array& fresh, const Array& ring, std::int64_t window,
                              std::int64_t ring_size, std::int64_t ratio, const std::optional<Array>& entries,
                              const std::optional<Array>& tables, std::int64_t per_page,
                              const std::optional<Array>& blocks, const Array& out) {
  AttendArgs a{};
  a.q = q.as<float>("q", {-1, -1, -1});
  const std::int64_t tokens = q.shape[0];
  a.heads = q.shape[1];
  a.dim = q.shape[2];
  a.turn = turn.as<float>("turn", {tokens, -1, 2});
  a.rotated = 2 * turn.shape[1];
  if (a.rotated > a.dim) throw nb::value_error("turn has more pairs than a head has values");
  a.sink = sink.as<float>("sink", {a.heads});
  a.eps = eps;
  a.scale = scale;
  a.spans = reinterpret_cast<const Span*>(spans.as<std::int64_t>("spans", {-1, 6}));
  a.sequences = spans.shape[0];
  a.fresh = rows_of("fresh", fresh, Stored::entry, a.dim, a.rotated);
  a.ring = rows_of("ring", ring, Stored::entry, a.dim, a.rotated);
  if (a.ring.stored != a.fresh.stored || fresh.shape[0] < tokens)
    throw nb::value_error("fresh is not of the ring's type, or has fewer rows than there are tokens");
  a.window = window;
  a.ring_size = ring_size;
  std::int64_t entry_rows = 0;
  if (ratio > 0) {
    if (!entries || !tables) throw nb::value_error("compressed blocks need entries and tables");
    a.ratio = ratio;
    a.entries = rows_of("entries", *entries, Stored::entry, a.dim, a.rotated);
    entry_rows = entries->shape[0];
    a.pages = pages_of(*tables, a.sequences, per_page);
    if (blocks) {
      a.blocks = blocks->as<std::int64_t>("blocks", {-1, -1});
      a.k = blocks->shape[1];
      if (blocks->shape[0] < tokens && a.sequences > 0 &&
          blocks->shape[0] < a.spans[a.sequences - 1].first + a.spans[a.sequences - 1].length)
        throw nb::value_error("blocks has fewer rows than there are tokens");
    }
  }
  a.out = out.as<float>("out", {tokens, a.heads, a.dim});
  if (!inside(a, tokens, ring.shape[0], entry_rows))
    throw nb::value_error("spans, tables or blocks point outside of the arrays");
  return a;
}

// Tokens of all sequences; rows behind them belong to nobody.
inline std::int64_t tokens_of(const AttendArgs& a) {
  return a.sequences == 0 ? 0 : a.spans[a.sequences - 1].first + a.spans[a.sequences - 1].length;
}

}  // namespace abyssal
