#include "ops/encode.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_encode(nb::module_& m) {
  m.def("encode", [](bool key, std::int64_t rotated, const Array& x, const Array& y) {
    if (x.ndim < 1 || y.ndim < 1) throw nb::value_error("x and y need a dimension");
    const std::int64_t dim = x.shape[x.ndim - 1], rows = dim > 0 ? x.size() / dim : 0;
    if (rotated < 0 || rotated > dim || (key && dim % 2 != 0)) throw nb::value_error("dimensions do not fit");
    const std::int64_t plain = dim - rotated;
    const std::int64_t bytes = key ? dim / 2 + (dim + 31) / 32 : (plain + 2 * rotated + (plain + 63) / 64 + 7) / 8 * 8;
    if (y.shape[y.ndim - 1] != bytes || y.size() != rows * bytes) throw nb::value_error("y does not fit x");
    const EncodeArgs args{key, rows, dim, rotated, bytes, x.any<float>("x"), y.any<std::uint8_t>("y")};
    ABYSSAL_CALL(encode, args);
  });
}

}  // namespace abyssal
