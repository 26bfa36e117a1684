#include "bind/attend.hpp"

#include <cstring>

namespace abyssal {

void bind_attend(nb::module_& m) {
  m.def(
      "attend",
      [](const Array& q, const Array& turn, const Array& sink, float eps, float scale, const Array& spans,
         const Array& fresh, const Array& ring, std::int64_t window, std::int64_t ring_size, std::int64_t ratio,
         const std::optional<Array>& entries, const std::optional<Array>& tables, std::int64_t per_page,
         const std::optional<Array>& blocks, const Array& out, bool kept) {
        AttendArgs a = attend_args(q, turn, sink, eps, scale, spans, fresh, ring, window, ring_size, ratio, entries,
                                   tables, per_page, blocks, out);
        a.kept = kept;
        // rows of nobody stay zero
        const std::int64_t used = tokens_of(a);
        std::memset(a.out + used * a.heads * a.dim, 0,
                    static_cast<std::size_t>((q.shape[0] - used) * a.heads * a.dim) * sizeof(float));
        ABYSSAL_CALL(attend, a);
      },
      nb::arg("q"), nb::arg("turn"), nb::arg("sink"), nb::arg("eps"), nb::arg("scale"), nb::arg("spans"),
      nb::arg("fresh"), nb::arg("ring"), nb::arg("window"), nb::arg("ring_size"), nb::arg("ratio"),
      nb::arg("entries").none(), nb::arg("tables").none(), nb::arg("per_page"), nb::arg("blocks").none(),
      nb::arg("out"), nb::arg("kept"));
}

}  // namespace abyssal
