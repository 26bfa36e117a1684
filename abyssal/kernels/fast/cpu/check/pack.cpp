#include "ops/pack.hpp"

#include "check/check.hpp"

namespace abyssal {

void check_pack(const Kernels& kernels) {
  for (const Format format : {Format::float32, Format::bfloat16, Format::float8, Format::float4})
    for (const std::int64_t outputs : {1, 15, 16, 33})
      for (const std::int64_t inputs : {2, 30, 32, 100}) {
        const std::int64_t bits = 32 >> static_cast<int>(format);
        const Weight shape{format, outputs, inputs, nullptr, nullptr, nullptr};
        std::vector<std::uint8_t> stored(static_cast<std::size_t>(2 * outputs * inputs * bits / 8));
        for (auto& byte : stored) byte = static_cast<std::uint8_t>(chance()());
        const auto bytes = static_cast<std::size_t>(2 * shape.strips() * shape.groups() * block_bytes(format));
        std::vector<std::uint8_t> packed(bytes), again(bytes), back(stored.size());
        const bool with = format == Format::float4;
        std::vector<std::uint8_t> scales(static_cast<std::size_t>(2 * outputs * shape.groups())), scales_back(scales);
        for (auto& byte : scales) byte = static_cast<std::uint8_t>(chance()());
        std::vector<std::uint8_t> packed_scales(static_cast<std::size_t>(2 * shape.strips() * shape.groups() * 16));
        std::vector<std::uint8_t> scales_again(packed_scales);
        std::uint8_t* const there = with ? packed_scales.data() : nullptr;
        kernels.pack({format, 2, outputs, inputs, stored.data(), packed.data(), false, scales.data(), there});
        plain().pack({format, 2, outputs, inputs, stored.data(), again.data(), false, scales.data(),
                      with ? scales_again.data() : nullptr});
        ABYSSAL_EXPECT(packed == again && packed_scales == scales_again);
        kernels.pack({format, 2, outputs, inputs, back.data(), packed.data(), true, scales_back.data(), there});
        ABYSSAL_EXPECT(back == stored && (!with || scales_back == scales));
      }
}

}  // namespace abyssal
