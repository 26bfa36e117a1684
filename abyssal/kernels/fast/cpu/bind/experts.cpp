#include "ops/experts.hpp"

#include "bind/expert_weights.hpp"

namespace abyssal {

namespace {

// Gate and up of a tuple, from place `first` on.
Kept kept_of(const nb::tuple& arrays, std::size_t first, std::int64_t rows, std::int64_t inner) {
  if (arrays.size() < first + 2) throw nb::value_error("kept must be gate and up of the routed and shared experts");
  return {nb::cast<Array>(arrays[first]).as<float>("gate", {rows, inner}),
          nb::cast<Array>(arrays[first + 1]).as<float>("up", {rows, inner})};
}

}  // namespace

void bind_experts(nb::module_& m) {
  m.def(
      "experts",
      [](const PackedWeight& w1, const PackedWeight& w3, const PackedWeight& w2, nb::object shared, const Array& x,
         const Array& gains, const Array& chosen, double limit, std::int64_t block, const Array& y, nb::object kept) {
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
        if (!kept.is_none()) {
          const auto arrays = nb::cast<nb::tuple>(kept);
          a.kept_routed = kept_of(arrays, 0, a.tokens * a.k, a.routed.w1.outputs);
          if (a.shared.matrices > 0) a.kept_shared = kept_of(arrays, 2, a.tokens, a.shared.w1.outputs);
        }
        ABYSSAL_CALL(experts, a);
      },
      nb::arg("w1"), nb::arg("w3"), nb::arg("w2"), nb::arg("shared").none(), nb::arg("x"), nb::arg("gains"),
      nb::arg("chosen"), nb::arg("limit"), nb::arg("block"), nb::arg("y"), nb::arg("kept").none());
}

}  // namespace abyssal
