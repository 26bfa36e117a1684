#include "ops/streams.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_leave_backward(nb::module_& m) {
  m.def("leave_backward", [](const Array& y, const Array& x, const Array& gates, const Array& dout, const Array& dy,
                             const Array& dx, const Array& dgates) {
    LeaveBackwardArgs a{};
    a.x = x.as<float>("x", {-1, -1, -1});
    a.tokens = x.shape[0], a.streams = x.shape[1], a.width = x.shape[2];
    if (a.streams < 1 || a.streams > most_streams) throw nb::value_error("1 to 8 streams");
    const std::int64_t n = a.streams, size = a.tokens * n * (1 + n);
    a.y = y.as<float>("y", {a.tokens, a.width});
    a.post = gates.as<float>("gates", {size});
    a.mix = a.post + a.tokens * n;
    a.dout = dout.as<float>("dout", {a.tokens, n, a.width});
    a.dy = dy.as<float>("dy", {a.tokens, a.width});
    a.dx = dx.as<float>("dx", {a.tokens, n, a.width});
    a.dpost = dgates.as<float>("dgates", {size});
    a.dmix = a.dpost + a.tokens * n;
    ABYSSAL_CALL(leave_backward, a);
  });
}

}  // namespace abyssal
