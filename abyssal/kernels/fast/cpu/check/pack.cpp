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
        kernels.pack({format, 2, outputs, inputs, stored.data(), packed.data(), false});
        plain().pack({format, 2, outputs, inputs, stored.data(), again.data(), false});
        ABYSSAL_EXPECT(packed == again);
        kernels.pack({format, 2, outputs, inputs, back.data(), packed.data(), true});
        ABYSSAL_EXPECT(back == stored);
      }
}

}  // namespace abyssal
