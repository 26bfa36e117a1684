#include "ops/linear.hpp"

#include "bind/weight.hpp"

namespace abyssal {

namespace {

PackedWeight make_weight(int format, std::int64_t matrices, std::int64_t outputs, std::int64_t inputs, bool stored,
                         nb::object data, nb::object scales) {
  if (format < 0 || format > 3) throw nb::value_error("unknown format");
  if (matrices < 0 || outputs < 0 || inputs < 0) throw nb::value_error("sizes must not be negative");
  Weight weight{static_cast<Format>(format), outputs, inputs, nullptr, nullptr, nullptr};
  const std::int64_t bits = 32 >> format, groups = weight.groups(), strips = weight.strips();
  if (inputs * bits % 8 != 0) throw nb::value_error("rows must be whole bytes");
  const std::int64_t bytes = matrices * (stored ? outputs * inputs * bits / 8 : strips * groups * block_bytes(weight.format));
  weight.data = nb::cast<Array>(data).as<std::uint8_t>("data", {bytes});
  if (weight.format == Format::float4)
    weight.scales =
        nb::cast<Array>(scales).as<std::uint8_t>("scales", {matrices * groups * (stored ? outputs : strips * strip_outputs)});
  if (weight.format == Format::float8)
    weight.tile_scales = nb::cast<Array>(scales).as<float>(
        "scales", {matrices * ((outputs + tile_side - 1) / tile_side) * weight.tiles_across()});
  return PackedWeight{{weight, stored, matrices}, data, scales};
}

void run_linear(const PackedWeight& w, const Array& x, const Array& y, const Array* firsts, bool columns) {
  const std::int64_t parts = columns ? w.matrices : 1, rows = x.ndim > 0 ? x.shape[0] : 0;
  const Type type = x.type == Type::bfloat16 ? Type::bfloat16 : Type::float32;
  x.check("x", type, {-1, parts * w.weight.inputs});
  y.check("y", type, {rows, parts * w.weight.outputs});
  const std::int64_t* list = nullptr;
  if (firsts != nullptr) {
    list = firsts->as<std::int64_t>("firsts", {w.matrices + 1});
    bool rising = list[0] == 0 && list[w.matrices] == rows;
    for (std::int64_t e = 0; e < w.matrices; ++e) rising = rising && list[e] <= list[e + 1];
    if (!rising) throw nb::value_error("firsts must rise from 0 to the number of rows");
  } else if (!columns && w.matrices != 1) {
    throw nb::value_error("a weight of several matrices needs firsts, or columns");
  }
  const LinearArgs args{w.weight, w.stored, w.matrices, list, columns, rows, type == Type::bfloat16, x.data, y.data,
                        parts * w.weight.inputs, parts * w.weight.outputs};
  ABYSSAL_CALL(linear, args);
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<PackedWeight>(m, "Weight")
      .def(
          "__init__",
          [](PackedWeight* self, int format, std::int64_t matrices, std::int64_t outputs, std::int64_t inputs,
             bool stored, nb::object data, nb::object scales) {
            new (self) PackedWeight(make_weight(format, matrices, outputs, inputs, stored, data, scales));
          },
          nb::arg("format"), nb::arg("matrices"), nb::arg("outputs"), nb::arg("inputs"), nb::arg("stored"),
          nb::arg("data"), nb::arg("scales").none());
  m.def("linear", [](const PackedWeight& weight, const Array& x, const Array& y) {
    run_linear(weight, x, y, nullptr, false);
  });
  m.def("linear_by_rows", [](const PackedWeight& weight, const Array& x, const Array& firsts, const Array& y) {
    run_linear(weight, x, y, &firsts, false);
  });
  m.def("linear_by_columns", [](const PackedWeight& weight, const Array& x, const Array& y) {
    run_linear(weight, x, y, nullptr, true);
  });
}

}  // namespace abyssal
