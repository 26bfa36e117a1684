#include "ops/pack.hpp"

#include "bind/bind.hpp"

namespace abyssal {

void bind_pack(nb::module_& m) {
  m.def(
      "pack",
      [](int format, std::int64_t matrices, std::int64_t outputs, std::int64_t inputs, const Array& stored,
         const Array& packed, bool back, nb::object stored_scales, nb::object packed_scales) {
        if (format < 0 || format > 3) throw nb::value_error("unknown format");
        const Weight shape{static_cast<Format>(format), outputs, inputs, nullptr, nullptr, nullptr};
        const std::int64_t bits = 32 >> format;
        if (inputs * bits % 8 != 0) throw nb::value_error("rows must be whole bytes");
        PackArgs args{shape.format, matrices, outputs, inputs, nullptr, nullptr, back, nullptr, nullptr};
        args.stored = stored.as<std::uint8_t>("stored", {matrices * outputs * inputs * bits / 8});
        args.packed =
            packed.as<std::uint8_t>("packed", {matrices * shape.strips() * shape.groups() * block_bytes(shape.format)});
        if (args.stored == args.packed && args.stored != nullptr && (outputs % strip_outputs != 0 || inputs % group_inputs != 0))
          throw nb::value_error("in place, outputs must come in strips of 16 and inputs in groups of 32");
        if (!packed_scales.is_none()) {
          if (shape.format != Format::float4) throw nb::value_error("only float4's scales are packed");
          const std::int64_t groups = shape.groups();
          args.stored_scales = nb::cast<Array>(stored_scales).as<std::uint8_t>("stored_scales", {matrices * outputs * groups});
          args.packed_scales = nb::cast<Array>(packed_scales)
                                   .as<std::uint8_t>("packed_scales", {matrices * shape.strips() * groups * strip_outputs});
        }
        ABYSSAL_CALL(pack, args);
      },
      nb::arg("format"), nb::arg("matrices"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("stored"),
      nb::arg("packed"), nb::arg("back"), nb::arg("stored_scales").none(), nb::arg("packed_scales").none());
}

}  // namespace abyssal
