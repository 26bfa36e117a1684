#include "bind/site.hpp"

namespace abyssal {

void bind_enter_backward(nb::module_& m) {
  m.def(
      "enter_backward",
      [](const Array& x, const Array& fn, const Array& base, const Array& scale, nb::object norm, double rms_eps,
         double eps, int iterations, const Array& dy, nb::object dgates, const Array& dx, const Array& dfn,
         const Array& dbase, const Array& dscale, nb::object dnorm) {
        EnterBackwardArgs a{};
        set_site(a, x, fn, base, scale, norm, rms_eps, eps, iterations, !dgates.is_none());
        a.dy = dy.as<float>("dy", {a.tokens, a.width});
        if (a.mixed) {
          a.dpost = gates_of(a, dgates, "dgates");
          a.dmix = a.dpost + a.tokens * a.streams;
        }
        a.dx = dx.as<float>("dx", {a.tokens, a.streams, a.width});
        a.dfn = dfn.as<float>("dfn", {a.gates(), a.streams * a.width});
        a.dbase = dbase.as<float>("dbase", {a.gates()});
        a.dscale = dscale.as<float>("dscale", {a.mixed ? 3 : 1});
        if (a.norm != nullptr) a.dnorm = nb::cast<Array>(dnorm).as<float>("dnorm", {a.width});
        ABYSSAL_CALL(enter_backward, a);
      },
      nb::arg("x"), nb::arg("fn"), nb::arg("base"), nb::arg("scale"), nb::arg("norm").none(), nb::arg("rms_eps"),
      nb::arg("eps"), nb::arg("iterations"), nb::arg("dy"), nb::arg("dgates").none(), nb::arg("dx"), nb::arg("dfn"),
      nb::arg("dbase"), nb::arg("dscale"), nb::arg("dnorm").none());
}

}  // namespace abyssal
