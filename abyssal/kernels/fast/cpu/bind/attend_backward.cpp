#include <cstring>
#include <vector>

#include "bind/attend.hpp"

namespace abyssal {

namespace {

// Gradients of a page are added by its sequence alone.
bool apart(const AttendArgs& a, std::int64_t rows) {
  std::vector<bool> taken(static_cast<std::size_t>(rows / a.pages.per_page + 1));
  for (std::int64_t i = 0; i < a.sequences * a.pages.most; ++i) {
    const auto page = static_cast<std::size_t>(a.pages.tables[i]);
    if (taken[page]) return false;
    taken[page] = true;
  }
  return true;
}

float* cleared(const char* name, const Array& array, const Array& like) {
  float* data = array.as<float>(name, {like.shape[0], like.shape[1]});
  std::memset(data, 0, static_cast<std::size_t>(array.size()) * sizeof(float));
  return data;
}

}  // namespace

void bind_attend_backward(nb::module_& m) {
  m.def(
      "attend_backward",
      [](const Array& q, const Array& turn, const Array& sink, float eps, float scale, const Array& spans,
         const Array& fresh, const Array& ring, std::int64_t window, std::int64_t ring_size, std::int64_t ratio,
         const std::optional<Array>& entries, const std::optional<Array>& tables, std::int64_t per_page,
         const std::optional<Array>& blocks, const Array& out, const Array& dout, const Array& dq, const Array& dsink,
         const Array& dfresh, const Array& dring, const std::optional<Array>& dentries) {
        AttendBackwardArgs b{};
        b.of = attend_args(q, turn, sink, eps, scale, spans, fresh, ring, window, ring_size, ratio, entries, tables,
                           per_page, blocks, out);
        const AttendArgs& a = b.of;
        const std::int64_t tokens = q.shape[0];
        if (a.fresh.stored != Stored::float32 || (a.ratio > 0 && a.entries.stored != Stored::float32))
          throw nb::value_error("gradients are those of float32 entries");
        b.dout = dout.as<float>("dout", {tokens, a.heads, a.dim});
        b.dq = dq.as<float>("dq", {tokens, a.heads, a.dim});
        b.dsink = dsink.as<float>("dsink", {a.heads});
        b.dfresh = cleared("dfresh", dfresh, fresh);
        b.dring = cleared("dring", dring, ring);
        if (a.ratio > 0) {
          if (!dentries || !apart(a, entries->shape[0]))
            throw nb::value_error("compressed blocks need dentries, and pages of one sequence each");
          b.dentries = cleared("dentries", *dentries, *entries);
        }
        const std::int64_t used = tokens_of(a);
        std::memset(b.dq + used * a.heads * a.dim, 0,
                    static_cast<std::size_t>((tokens - used) * a.heads * a.dim) * sizeof(float));
        ABYSSAL_CALL(attend_backward, b);
      },
      nb::arg("q"), nb::arg("turn"), nb::arg("sink"), nb::arg("eps"), nb::arg("scale"), nb::arg("spans"),
      nb::arg("fresh"), nb::arg("ring"), nb::arg("window"), nb::arg("ring_size"), nb::arg("ratio"),
      nb::arg("entries").none(), nb::arg("tables").none(), nb::arg("per_page"), nb::arg("blocks").none(),
      nb::arg("out"), nb::arg("dout"), nb::arg("dq"), nb::arg("dsink"), nb::arg("dfresh"), nb::arg("dring"),
      nb::arg("dentries").none());
}

}  // namespace abyssal
