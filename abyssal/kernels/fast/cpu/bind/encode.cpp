#include "ops/encode.hpp"

#include "bind/rows.hpp"

namespace abyssal {

void bind_encode(nb::module_& m) {
  m.def("encode", [](const Array& x, bool key, std::int64_t rotated, const Array& to) {
    EncodeArgs a{};
    a.x = x.as<float>("x", {-1, -1});
    a.rows = x.shape[0];
    a.key = key;
    if (rotated < 0 || rotated > x.shape[1]) throw nb::value_error("more rotated values than there are");
    a.to = rows_of("to", to, key ? Stored::key : Stored::entry, x.shape[1], rotated);
    if (a.to.stored == Stored::bfloat16 || to.shape[0] != a.rows)
      throw nb::value_error("to must have a row of float32 or bytes for each of x");
    a.data = static_cast<std::uint8_t*>(to.data);
    ABYSSAL_CALL(encode, a);
  });
}

}  // namespace abyssal
