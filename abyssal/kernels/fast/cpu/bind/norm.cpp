#include "ops/norm.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_norm(nb::module_& m) {
  m.def(
      "norm",
      [](const Array& x, bool normed, nb::object weight, double eps, nb::object turn, bool inverse, const Array& y) {
        if (x.ndim < 1) throw nb::value_error("x needs a dimension");
        NormArgs a{};
        a.width = x.shape[x.ndim - 1];
        a.rows = a.width > 0 ? x.size() / a.width : 0;
        a.x = x.any<float>("x");
        a.y = y.any<float>("y");
        if (y.size() != x.size()) throw nb::value_error("y must have the shape of x");
        a.normed = normed;
        a.inverse = inverse;
        a.eps = static_cast<float>(eps);
        if (!weight.is_none()) a.weight = nb::cast<Array>(weight).as<float>("weight", {a.width});
        if (!turn.is_none()) {
          const auto turns = nb::cast<Array>(turn);
          a.turn = turns.complex("turn");
          a.turned = 2 * turns.shape[turns.ndim - 1];
          const std::int64_t positions = a.turned > 0 ? 2 * turns.size() / a.turned : 0;
          if (a.turned == 0) a.turn = nullptr;
          else if (a.turned > a.width || (positions == 0 ? a.rows != 0 : a.rows % positions != 0))
            throw nb::value_error("turn does not fit x");
          a.repeat = positions > 0 && a.rows > 0 ? a.rows / positions : 1;
        }
        ABYSSAL_CALL(norm, a);
      },
      nb::arg("x"), nb::arg("normed"), nb::arg("weight").none(), nb::arg("eps"), nb::arg("turn").none(),
      nb::arg("inverse"), nb::arg("y"));
}

}  // namespace abyssal
