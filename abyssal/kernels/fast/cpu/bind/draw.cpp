#include "ops/draw.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_draw(nb::module_& m) {
  m.def(
      "draw",
      [](const Array& logits, nb::object ids, std::uint64_t seed, std::uint64_t choice, std::uint64_t place) {
        DrawArgs a{};
        a.logits = logits.as<double>("logits", {-1});
        a.count = logits.shape[0];
        if (!ids.is_none()) {
          const auto list = nb::cast<Array>(ids);
          a.ids = list.as<std::int64_t>("ids", {-1});
          a.count = list.shape[0];
          for (std::int64_t i = 0; i < a.count; ++i)
            if (a.ids[i] < (i == 0 ? 0 : a.ids[i - 1] + 1) || a.ids[i] >= logits.shape[0])
              throw nb::value_error("ids must rise and lie below the number of logits");
        }
        a.key[0] = seed, a.key[1] = choice, a.place = place;
        std::int64_t token = -1;
        a.token = &token;
        ABYSSAL_CALL(draw, a);
        return token;
      },
      nb::arg("logits"), nb::arg("ids").none(), nb::arg("seed"), nb::arg("choice"), nb::arg("place"));
}

}  // namespace abyssal
