#include "bind/bind.hpp"
#include "ops/read.hpp"

namespace abyssal {

void bind_read(nb::module_& m) {
  m.def("read", [](const Array& data) {
    std::uint64_t sum = 0;
    const ReadArgs args{data.as<std::uint8_t>("data", {-1}), data.size(), &sum};
    ABYSSAL_CALL(read, args);
    return sum;
  });
}

}  // namespace abyssal
