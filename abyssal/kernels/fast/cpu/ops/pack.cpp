#include "ops/pack.hpp"

#include "ops/packing.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

// The scales of a strip of `count` outputs; `packed` gets zeros for the others.
void convert_scales(std::uint8_t* stored, std::uint8_t* packed, std::int64_t count, std::int64_t groups, bool back) {
  if (back) {
    for (std::int64_t lane = 0; lane < count; ++lane)
      for (std::int64_t g = 0; g < groups; ++g) stored[lane * groups + g] = packed[g * strip_outputs + lane];
    return;
  }
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t lane = 0; lane < strip_outputs; ++lane)
      packed[g * strip_outputs + lane] = lane < count ? stored[lane * groups + g] : std::uint8_t{0};
}

}  // namespace

void pack(const PackArgs& a) {
  if (a.outputs == 0 || a.inputs == 0) return;
  const Weight shape{a.format, a.outputs, a.inputs, nullptr, nullptr, nullptr};
  const std::int64_t strips = shape.strips(), groups = shape.groups();
  const std::int64_t row_bytes = bytes_of_row(a.format, a.inputs);
  parallel(a.matrices * strips, [&](std::int64_t t) {
    const std::int64_t first = t % strips * strip_outputs;
    const std::int64_t count = a.outputs - first < strip_outputs ? a.outputs - first : strip_outputs;
    std::uint8_t* stored = a.stored + (t / strips * a.outputs + first) * row_bytes;
    auto* blocks = reinterpret_cast<std::uint32_t*>(a.packed + t * groups * block_bytes(a.format));
    // a copy between, since `packed` may lie where `stored` does
    Buffer<std::uint32_t> spare(groups * block_bytes(a.format) / 4);
    if (a.back) convert_strip<true>(a.format, stored, row_bytes, count, groups, blocks, &spare[0]);
    else convert_strip<false>(a.format, stored, row_bytes, count, groups, blocks, &spare[0]);
    if (a.packed_scales != nullptr)
      convert_scales(a.stored_scales + (t / strips * a.outputs + first) * groups,
                     a.packed_scales + t * groups * strip_outputs, count, groups, a.back);
  });
}

}  // namespace abyssal::ABYSSAL_ISA
