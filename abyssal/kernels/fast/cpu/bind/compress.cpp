#include "ops/compress.hpp"

#include <nanobind/stl/optional.h>

#include <optional>

#include "bind/inside.hpp"

namespace abyssal {

void bind_compress(nb::module_& m) {
  m.def(
      "compress",
      [](const Array& values, const Array& logits, const Array& ape, const Array& spans, const Array& ring_values,
         const Array& ring_logits, std::int64_t ring_size, const Array& norm, float eps, const Array& turn,
         const std::optional<Array>& entries, const std::optional<Array>& tables, std::int64_t per_page,
         const Array& out) {
        CompressArgs a{};
        a.ape = ape.as<float>("ape", {-1, -1});
        a.ratio = ape.shape[0];
        const std::int64_t width = ape.shape[1];
        a.norm = norm.as<float>("norm", {-1});
        a.dim = norm.shape[0];
        a.overlap = width != a.dim;
        if (a.dim < 1 || (a.overlap && width != 2 * a.dim)) throw nb::value_error("ape needs as many channels as norm, or twice");
        a.values = values.as<float>("values", {-1, width});
        a.logits = logits.as<float>("logits", {values.shape[0], width});
        a.spans = reinterpret_cast<const Span*>(spans.as<std::int64_t>("spans", {-1, 6}));
        a.sequences = spans.shape[0];
        a.ring_values = ring_values.as<float>("ring_values", {-1, width});
        a.ring_logits = ring_logits.as<float>("ring_logits", {ring_values.shape[0], width});
        a.ring_size = ring_size;
        a.eps = eps;
        a.out = out.as<float>("out", {-1, a.dim});
        a.turn = turn.as<float>("turn", {out.shape[0], -1, 2});
        a.rotated = 2 * turn.shape[1];
        if (a.rotated > a.dim) throw nb::value_error("turn has more pairs than an entry has values");
        std::int64_t entry_rows = 0;
        if (entries) {
          if (!tables) throw nb::value_error("entries need tables");
          a.entries = entries->as<float>("entries", {-1, a.dim});
          entry_rows = entries->shape[0];
          a.pages = pages_of(*tables, a.sequences, per_page);
        }
        if (!inside(a, values.shape[0], ring_values.shape[0], entries ? entry_rows : -1, out.shape[0]))
          throw nb::value_error("spans, tables or turn do not fit the arrays");
        ABYSSAL_CALL(compress, a);
      },
      nb::arg("values"), nb::arg("logits"), nb::arg("ape"), nb::arg("spans"), nb::arg("ring_values"),
      nb::arg("ring_logits"), nb::arg("ring_size"), nb::arg("norm"), nb::arg("eps"), nb::arg("turn"),
      nb::arg("entries").none(), nb::arg("tables").none(), nb::arg("per_page"), nb::arg("out"));
}

}  // namespace abyssal
