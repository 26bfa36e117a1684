// A matrix as the kernels read it: the stored numbers in another order, of the same size.
//
// Sixteen outputs form a strip, 32 inputs a group. The block of a strip and a group lies in one piece; blocks follow
// one another by group, strips by output, so a product reads memory from front to back. Lanes are outputs.
#pragma once

#include <cstdint>

namespace abyssal {

enum class Format : int { float32, bfloat16, float8, float4 };

constexpr int strip_outputs = 16;
constexpr int group_inputs = 32;
constexpr int tile_side = 128;  // outputs and inputs that share a scale of FP8

struct Weight {
  Format format;
  std::int64_t outputs, inputs;
  const std::uint8_t* data;    // [strips][groups][block]
  const std::uint8_t* scales;  // float4: E8M0, [strips][groups][16]
  const float* tile_scales;    // float8: [outputs / 128][inputs / 128], both rounded up

  std::int64_t strips() const { return (outputs + strip_outputs - 1) / strip_outputs; }
  std::int64_t groups() const { return (inputs + group_inputs - 1) / group_inputs; }
  std::int64_t tiles_across() const { return (inputs + tile_side - 1) / tile_side; }
};

constexpr std::int64_t block_bytes(Format format) {
  switch (format) {
    case Format::float32: return 2048;
    case Format::bfloat16: return 1024;
    case Format::float8: return 512;
    default: return 256;
  }
}

}  // namespace abyssal
