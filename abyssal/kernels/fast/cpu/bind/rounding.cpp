#include "ops/rounding.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_rounding(nb::module_& m) {
  m.def("rounding", [](int kind, std::int64_t block, const Array& x, const Array& y) {
    if (kind < 0 || kind > 2 || block < 1 || x.ndim < 1) throw nb::value_error("unknown rounding");
    const std::int64_t width = x.shape[x.ndim - 1];
    const auto what = static_cast<Rounding>(kind);
    if (what == Rounding::hadamard && (width & (width - 1)) != 0) throw nb::value_error("width is no power of two");
    if (y.size() != x.size()) throw nb::value_error("y must have the shape of x");
    const RoundingArgs args{what, width > 0 ? x.size() / width : 0, width, block, x.any<float>("x"), y.any<float>("y")};
    ABYSSAL_CALL(rounding, args);
  });
}

}  // namespace abyssal
