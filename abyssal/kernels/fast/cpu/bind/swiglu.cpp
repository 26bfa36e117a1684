#include "ops/swiglu.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_swiglu(nb::module_& m) {
  m.def(
      "swiglu",
      [](const Array& gate, const Array& up, nb::object gains, double limit, const Array& y) {
        SwigluArgs a{};
        a.gate = gate.as<float>("gate", {-1, -1});
        a.rows = gate.shape[0], a.width = gate.shape[1];
        a.up = up.as<float>("up", {a.rows, a.width});
        a.y = y.as<float>("y", {a.rows, a.width});
        if (!gains.is_none()) a.gains = nb::cast<Array>(gains).as<float>("gains", {a.rows});
        a.limit = static_cast<float>(limit);
        ABYSSAL_CALL(swiglu, a);
      },
      nb::arg("gate"), nb::arg("up"), nb::arg("gains").none(), nb::arg("limit"), nb::arg("y"));
}

}  // namespace abyssal
