#include "ops/experts.hpp"

#include "bind/expert_weights.hpp"

namespace abyssal {

void bind_experts(nb::module_& m) {
  m.def(
      "experts",
      [](const PackedWeight& w1, const PackedWeight& w3, const PackedWeight& w2, nb::object shared, const Array& x,
         const Array& gains, const Array& chosen, double limit, std::int64_t block, const Array& y) {
        ExpertsArgs a{};
        a.routed = expert_weights(w1, w3, w2);
        a.shared = shared_weights(shared, a.routed);
        a.x = x.as<float>("x", {-1, a.routed.w1.inputs});
        a.tokens = x.shape[0];
        a.gains = gains.as<float>("gains", {a.tokens, -1});
        a.k = gains.shape[1];
        a.chosen = chosen.as<std::int64_t>("chosen", {a.tokens, a.k});
        for (std::int64_t i = 0; i < a.tokens * a.k; ++i)
          if (a.chosen[i] < 0 || a.chosen[i] >= a.routed.matrices)
            throw nb::value_error("chosen names an expert that is none");
        a.limit = static_cast<float>(limit);
        a.block = block;
        a.y = y.as<float>("y", {a.tokens, a.routed.w1.inputs});
        ABYSSAL_CALL(experts, a);
      },
      nb::arg("w1"), nb::arg("w3"), nb::arg("w2"), nb::arg("shared").none(), nb::arg("x"), nb::arg("gains"),
      nb::arg("chosen"), nb::arg("limit"), nb::arg("block"), nb::arg("y"));
}

}  // namespace abyssal
