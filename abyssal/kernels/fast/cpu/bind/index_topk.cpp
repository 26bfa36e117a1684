#include "ops/index_topk.hpp"

#include "bind/inside.hpp"

namespace abyssal {

void bind_index_topk(nb::module_& m) {
  m.def("index_topk", [](const Array& q, const Array& weights, const Array& visible, const Array& firsts,
                         const Array& tables, const Array& keys, std::int64_t per_page, const Array& blocks) {
    IndexTopkArgs a{};
    a.q = q.as<float>("q", {-1, -1, -1});
    a.heads = q.shape[1];
    a.weights = weights.as<float>("weights", {q.shape[0], a.heads});
    a.keys = rows_of("keys", keys, Stored::key, q.shape[2], 0);
    a.firsts = firsts.as<std::int64_t>("firsts", {-1});
    a.sequences = firsts.shape[0] - 1;
    a.visible = visible.as<std::int64_t>("visible", {-1});
    a.blocks = blocks.as<std::int64_t>("blocks", {visible.shape[0], -1});
    a.k = blocks.shape[1];
    if (a.sequences < 0) throw nb::value_error("firsts is empty");
    a.pages = pages_of(tables, a.sequences, per_page);
    if (visible.shape[0] > q.shape[0] || !inside(a, visible.shape[0])) throw nb::value_error("firsts or visible lie outside of the queries or the page table");
    ABYSSAL_CALL(index_topk, a);
  });
}

}  // namespace abyssal
