#include "ops/route.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_route(nb::module_& m) {
  m.def(
      "route",
      [](const Array& logits, nb::object bias, nb::object given, double scale, const Array& weights,
         const Array& chosen) {
        RouteArgs a{};
        a.logits = logits.as<float>("logits", {-1, -1});
        a.tokens = logits.shape[0], a.experts = logits.shape[1];
        a.weights = weights.as<float>("weights", {a.tokens, -1});
        a.k = weights.shape[1];
        a.chosen = chosen.as<std::int64_t>("chosen", {a.tokens, a.k});
        a.scale = static_cast<float>(scale);
        if (!bias.is_none()) a.bias = nb::cast<Array>(bias).as<float>("bias", {a.experts});
        if (!given.is_none()) {
          a.given = nb::cast<Array>(given).as<std::int64_t>("given", {a.tokens, a.k});
          for (std::int64_t i = 0; i < a.tokens * a.k; ++i)
            if (a.given[i] < 0 || a.given[i] >= a.experts) throw nb::value_error("given names an expert that is none");
        } else if (a.k > a.experts) {
          throw nb::value_error("there are fewer experts than a token meets");
        }
        ABYSSAL_CALL(route, a);
      },
      nb::arg("logits"), nb::arg("bias").none(), nb::arg("given").none(), nb::arg("scale"), nb::arg("weights"),
      nb::arg("chosen"));
}

}  // namespace abyssal
