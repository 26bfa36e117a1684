#include "ops/linear.hpp"

#include "check/check.hpp"
#include "ops/pack.hpp"

namespace abyssal {

namespace {

struct Packed {
  std::vector<std::uint8_t> data, scales, stored, stored_scales;
  std::vector<float> tile_scales;
  Weight weight;
};

Packed random_weight(Format format, std::int64_t matrices, std::int64_t outputs, std::int64_t inputs) {
  Packed out;
  out.weight = {format, outputs, inputs, nullptr, nullptr, nullptr};
  const std::int64_t bits = 32 >> static_cast<int>(format);
  std::vector<std::uint8_t> stored(static_cast<std::size_t>(matrices * outputs * inputs * bits / 8));
  if (format == Format::float32 || format == Format::bfloat16) {
    const auto values = normal(matrices * outputs * inputs);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(&values[i]);
      const std::size_t size = static_cast<std::size_t>(bits / 8);
      for (std::size_t b = 0; b < size; ++b) stored[i * size + b] = bytes[4 - size + b];
    }
  } else {
    for (auto& byte : stored) {
      byte = static_cast<std::uint8_t>(chance()());
      if (format == Format::float8 && (byte & 0x7f) == 0x7f) byte ^= 1;  // no NaN
    }
  }
  const std::int64_t blocks = matrices * out.weight.strips() * out.weight.groups();
  out.data.resize(static_cast<std::size_t>(blocks * block_bytes(format)));
  plain().pack({format, matrices, outputs, inputs, stored.data(), out.data.data(), false, nullptr, nullptr});
  out.scales.resize(static_cast<std::size_t>(blocks * strip_outputs));
  for (auto& byte : out.scales) byte = static_cast<std::uint8_t>(120 + random_below(12));
  out.tile_scales.resize(static_cast<std::size_t>(matrices * ((outputs + 127) / 128) * out.weight.tiles_across()));
  for (auto& scale : out.tile_scales) scale = random_below(2) ? 0.25f : 8.0f;
  // as in a release: [matrices][outputs][groups]
  const std::int64_t strips = out.weight.strips(), groups = out.weight.groups();
  for (std::int64_t e = 0; e < matrices; ++e)
    for (std::int64_t o = 0; o < outputs; ++o)
      for (std::int64_t g = 0; g < groups; ++g)
        out.stored_scales.push_back(
            out.scales[static_cast<std::size_t>(((e * strips + o / 16) * groups + g) * 16 + o % 16)]);
  out.stored = stored;
  out.weight.data = out.data.data();
  out.weight.scales = out.scales.data();
  out.weight.tile_scales = out.tile_scales.data();
  return out;
}

template <class T>
void compare(const Kernels& kernels, const Packed& packed, const std::vector<T>& x, std::int64_t rows,
             const std::vector<std::int64_t>& firsts, bool columns, bool stored) {
  const auto matrices = static_cast<std::int64_t>(firsts.size()) - 1;
  const std::int64_t parts = columns ? matrices : 1;
  const auto size = static_cast<std::size_t>(rows * parts * packed.weight.outputs);
  std::vector<T> got(size), want(size);
  LinearArgs args{packed.weight, false, matrices, columns ? nullptr : firsts.data(), columns, rows, sizeof(T) == 2,
                  x.data(), want.data(), parts * packed.weight.inputs, parts * packed.weight.outputs};
  plain().linear(args);
  args.y = got.data();
  if (stored) {
    args.stored = true;
    args.weight.data = packed.stored.data();
    args.weight.scales = packed.stored_scales.data();
  }
  kernels.linear(args);
  ABYSSAL_EXPECT(got == want);
}

}  // namespace

void check_linear(const Kernels& kernels) {
  for (const Format format : {Format::float32, Format::bfloat16, Format::float8, Format::float4})
    for (const auto& [outputs, inputs] : {std::pair{1, 2}, {17, 64}, {70, 96}, {129, 286}}) {
      const Packed packed = random_weight(format, 2, outputs, inputs);
      for (const std::int64_t rows : {0, 1, 2, 3, 4, 5, 7, 31, 200}) {
        const auto x = normal(rows * inputs);
        std::vector<std::uint16_t> narrow(x.size());
        for (std::size_t i = 0; i < x.size(); ++i)
          narrow[i] = static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, x[i]) >> 16);
        // float32 rows that are bfloat16 numbers, for which there is a way of its own; a number far from 1 forbids it
        std::vector<float> cut(x.size());
        for (std::size_t i = 0; i < x.size(); ++i)
          cut[i] = __builtin_bit_cast(float, static_cast<std::uint32_t>(narrow[i]) << 16);
        compare(kernels, packed, cut, rows, {0, rows / 2, rows}, false, false);
        if (rows > 3) cut[static_cast<std::size_t>(inputs)] = rows % 2 == 0 ? 0x1p-130f : 0x1p100f;
        compare(kernels, packed, cut, rows, {0, rows / 2, rows}, false, true);
        if (rows % 2 == 0) {
          compare(kernels, packed, x, rows / 2, {0, 0, rows / 2}, true, rows == 4);
          compare(kernels, packed, narrow, rows / 2, {0, 0, rows / 2}, true, rows == 4);
        }
        for (const std::int64_t border : {std::int64_t{0}, rows / 3, rows}) {
          compare(kernels, packed, x, rows, {0, border, rows}, false, border == 0);
          compare(kernels, packed, narrow, rows, {0, border, rows}, false, border == rows);
        }
      }
    }
}

}  // namespace abyssal
