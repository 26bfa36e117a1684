#include "ops/experts_backward.hpp"

#include "bind/bind.hpp"

namespace abyssal {

namespace {

// Gradients of w1, w3 and w2 follow their gates, ups and weights: eight arrays.
ExpertGradients gradients_of(const nb::tuple& arrays, std::int64_t rows, std::int64_t width) {
  if (arrays.size() != 8) throw nb::value_error("w1, w3, w2, gate, up, dw1, dw3 and dw2 are wanted");
  const auto array = [&](std::size_t i) { return nb::cast<Array>(arrays[i]); };
  const Array w1 = array(0);
  ExpertGradients e{};
  e.w1 = w1.as<float>("w1", {-1, -1, width});
  e.matrices = w1.shape[0], e.inner = w1.shape[1];
  e.w3 = array(1).as<float>("w3", {e.matrices, e.inner, width});
  e.w2 = array(2).as<float>("w2", {e.matrices, width, e.inner});
  e.gate = array(3).as<float>("gate", {rows, e.inner});
  e.up = array(4).as<float>("up", {rows, e.inner});
  e.dw1 = array(5).as<float>("dw1", {e.matrices, e.inner, width});
  e.dw3 = array(6).as<float>("dw3", {e.matrices, e.inner, width});
  e.dw2 = array(7).as<float>("dw2", {e.matrices, width, e.inner});
  return e;
}

}  // namespace

void bind_experts_backward(nb::module_& m) {
  m.def(
      "experts_backward",
      [](const nb::tuple& routed, nb::object shared, const Array& x, const Array& gains, const Array& chosen,
         double limit, std::int64_t block, const Array& dy, const Array& dx, const Array& dgains) {
        ExpertsBackwardArgs a{};
        a.x = x.as<float>("x", {-1, -1});
        a.tokens = x.shape[0], a.width = x.shape[1];
        a.gains = gains.as<float>("gains", {a.tokens, -1});
        a.k = gains.shape[1];
        a.chosen = chosen.as<std::int64_t>("chosen", {a.tokens, a.k});
        a.routed = gradients_of(routed, a.tokens * a.k, a.width);
        if (!shared.is_none()) {
          a.shared = gradients_of(nb::cast<nb::tuple>(shared), a.tokens, a.width);
          if (a.shared.matrices != 1) throw nb::value_error("the shared expert is one");
        }
        for (std::int64_t i = 0; i < a.tokens * a.k; ++i)
          if (a.chosen[i] < 0 || a.chosen[i] >= a.routed.matrices)
            throw nb::value_error("chosen names an expert that is none");
        a.limit = static_cast<float>(limit);
        a.block = block;
        a.dy = dy.as<float>("dy", {a.tokens, a.width});
        a.dx = dx.as<float>("dx", {a.tokens, a.width});
        a.dgains = dgains.as<float>("dgains", {a.tokens, a.k});
        ABYSSAL_CALL(experts_backward, a);
      },
      nb::arg("routed"), nb::arg("shared").none(), nb::arg("x"), nb::arg("gains"), nb::arg("chosen"),
      nb::arg("limit"), nb::arg("block"), nb::arg("dy"), nb::arg("dx"), nb::arg("dgains"));
}

}  // namespace abyssal
