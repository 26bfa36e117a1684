#include "ops/streams.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_enter(nb::module_& m) {
  m.def(
      "enter",
      [](const Array& x, const Array& fn, const Array& base, const Array& scale, nb::object norm, double rms_eps,
         double eps, int iterations, const Array& y, nb::object gates) {
        EnterArgs a{};
        a.x = x.as<float>("x", {-1, -1, -1});
        a.tokens = x.shape[0], a.streams = x.shape[1], a.width = x.shape[2];
        if (a.streams < 1 || a.streams > most_streams) throw nb::value_error("1 to 8 streams");
        const bool mixed = !gates.is_none();
        const std::int64_t n = a.streams, rows = mixed ? (2 + n) * n : n;
        a.fn = fn.as<float>("fn", {rows, n * a.width});
        a.base = base.as<float>("base", {rows});
        a.scale = scale.as<float>("scale", {mixed ? 3 : 1});
        if (!norm.is_none()) a.norm = nb::cast<Array>(norm).as<float>("norm", {a.width});
        a.rms_eps = static_cast<float>(rms_eps);
        a.eps = static_cast<float>(eps);
        a.iterations = iterations;
        a.y = y.as<float>("y", {a.tokens, a.width});
        if (mixed) {
          // one array: post of all tokens, then mix of all tokens
          a.post = nb::cast<Array>(gates).as<float>("gates", {a.tokens * n * (1 + n)});
          a.mix = a.post + a.tokens * n;
        }
        ABYSSAL_CALL(enter, a);
      },
      nb::arg("x"), nb::arg("fn"), nb::arg("base"), nb::arg("scale"), nb::arg("norm").none(), nb::arg("rms_eps"),
      nb::arg("eps"), nb::arg("iterations"), nb::arg("y"), nb::arg("gates").none());
}

}  // namespace abyssal
