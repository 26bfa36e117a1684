#include "ops/linear.hpp"

#include "bind/weight.hpp"

namespace abyssal {

namespace {

void bind_weight(nb::module_& m) {
  nb::class_<PackedWeight>(m, "Weight")
      .def(
          "__init__",
          [](PackedWeight* self, int format, std::int64_t matrices, std::int64_t outputs, std::int64_t inputs,
             nb::object data, nb::object scales) {
            if (format < 0 || format > 3) throw nb::value_error("unknown format");
            Weight weight{static_cast<Format>(format), outputs, inputs, nullptr, nullptr, nullptr};
            const std::int64_t blocks = matrices * weight.strips() * weight.groups();
            const auto bytes = nb::cast<Array>(data);
            weight.data = bytes.as<std::uint8_t>("data", {blocks * block_bytes(weight.format)});
            if (weight.format == Format::float4)
              weight.scales = nb::cast<Array>(scales).as<std::uint8_t>("scales", {blocks * strip_outputs});
            if (weight.format == Format::float8)
              weight.tile_scales = nb::cast<Array>(scales).as<float>(
                  "scales", {matrices, (outputs + tile_side - 1) / tile_side, weight.tiles_across()});
            new (self) PackedWeight{weight, matrices, data, scales};
          },
          nb::arg("format"), nb::arg("matrices"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("data"),
          nb::arg("scales").none())
      .def_ro("matrices", &PackedWeight::matrices)
      .def_prop_ro("outputs", [](const PackedWeight& self) { return self.weight.outputs; })
      .def_prop_ro("inputs", [](const PackedWeight& self) { return self.weight.inputs; });
}

void run_linear(const PackedWeight& weight, const Array& x, const Array& y, const std::int64_t* firsts,
                std::int64_t matrices) {
  const bool narrow = x.type == Type::bfloat16;
  const std::int64_t rows = x.ndim > 0 ? x.shape[0] : 0;
  const Type type = narrow ? Type::bfloat16 : Type::float32;
  x.check("x", type, {-1, weight.weight.inputs});
  y.check("y", type, {rows, weight.weight.outputs});
  const LinearArgs args{weight.weight, matrices, firsts, rows, narrow, x.data, y.data};
  ABYSSAL_CALL(linear, args);
}

}  // namespace

void bind_linear(nb::module_& m) {
  bind_weight(m);
  m.def("linear", [](const PackedWeight& weight, const Array& x, const Array& y) {
    run_linear(weight, x, y, nullptr, 1);
  });
  m.def("grouped_linear", [](const PackedWeight& weight, const Array& x, const Array& firsts, const Array& y) {
    const std::int64_t* list = firsts.as<std::int64_t>("firsts", {weight.matrices + 1});
    const std::int64_t rows = x.ndim > 0 ? x.shape[0] : 0;
    bool rising = list[0] == 0 && list[weight.matrices] == rows;
    for (std::int64_t e = 0; e < weight.matrices; ++e) rising = rising && list[e] <= list[e + 1];
    if (!rising) throw nb::value_error("firsts must rise from 0 to the number of rows");
    run_linear(weight, x, y, list, weight.matrices);
  });
}

}  // namespace abyssal
