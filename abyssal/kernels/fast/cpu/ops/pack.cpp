#include "ops/pack.hpp"

#include "ops/packing.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"

namespace abyssal::ABYSSAL_ISA {

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
  });
}

}  // namespace abyssal::ABYSSAL_ISA
