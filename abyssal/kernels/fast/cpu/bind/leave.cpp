#include "ops/streams.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_leave(nb::module_& m) {
  m.def("leave", [](const Array& y, const Array& x, const Array& gates, const Array& out) {
    LeaveArgs a{};
    a.x = x.as<float>("x", {-1, -1, -1});
    a.tokens = x.shape[0], a.streams = x.shape[1], a.width = x.shape[2];
    if (a.streams < 1 || a.streams > most_streams) throw nb::value_error("1 to 8 streams");
    a.y = y.as<float>("y", {a.tokens, a.width});
    a.post = gates.as<float>("gates", {a.tokens * a.streams * (1 + a.streams)});
    a.mix = a.post + a.tokens * a.streams;
    a.out = out.as<float>("out", {a.tokens, a.streams, a.width});
    ABYSSAL_CALL(leave, a);
  });
}

}  // namespace abyssal
