#include "ops/pack.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_pack(nb::module_& m) {
  m.def(
      "pack",
      [](int format, std::int64_t matrices, std::int64_t outputs, std::int64_t inputs, const Array& stored,
         const Array& packed, bool back) {
        if (format < 0 || format > 3) throw nb::value_error("unknown format");
        const Weight shape{static_cast<Format>(format), outputs, inputs, nullptr, nullptr, nullptr};
        const std::int64_t bits = 32 >> format;
        if (inputs * bits % 8 != 0) throw nb::value_error("rows must be whole bytes");
        PackArgs args{shape.format, matrices, outputs, inputs, nullptr, nullptr, back};
        args.stored = stored.as<std::uint8_t>("stored", {matrices * outputs * inputs * bits / 8});
        args.packed =
            packed.as<std::uint8_t>("packed", {matrices * shape.strips() * shape.groups() * block_bytes(shape.format)});
        if (args.stored == args.packed && args.stored != nullptr && (outputs % strip_outputs != 0 || inputs % group_inputs != 0))
          throw nb::value_error("in place, outputs must come in strips of 16 and inputs in groups of 32");
        ABYSSAL_CALL(pack, args);
      },
      nb::arg("format"), nb::arg("matrices"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("stored"),
      nb::arg("packed"), nb::arg("back"));
}

}  // namespace abyssal
