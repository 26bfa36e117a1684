#include "bind/site.hpp"

namespace abyssal {

void bind_enter(nb::module_& m) {
  m.def(
      "enter",
      [](const Array& x, const Array& fn, const Array& base, const Array& scale, nb::object norm, double rms_eps,
         double eps, int iterations, const Array& y, nb::object gates) {
        EnterArgs a{};
        set_site(a, x, fn, base, scale, norm, rms_eps, eps, iterations, !gates.is_none());
        a.y = y.as<float>("y", {a.tokens, a.width});
        if (a.mixed) {
          a.post = gates_of(a, gates, "gates");
          a.mix = a.post + a.tokens * a.streams;
        }
        ABYSSAL_CALL(enter, a);
      },
      nb::arg("x"), nb::arg("fn"), nb::arg("base"), nb::arg("scale"), nb::arg("norm").none(), nb::arg("rms_eps"),
      nb::arg("eps"), nb::arg("iterations"), nb::arg("y"), nb::arg("gates").none());
}

}  // namespace abyssal
