// The order of numbers inside a strip (ops/pack.hpp), one word of 32 bits at a time.
#pragma once

#include <cstring>

#include "ops/weight.hpp"

namespace abyssal::ABYSSAL_ISA {

constexpr int bits_of(Format format) { return 32 >> static_cast<int>(format); }
constexpr std::int64_t bytes_of_row(Format format, std::int64_t inputs) { return inputs * bits_of(format) / 8; }

// Eight nibbles: those of even inputs move to the lower half, those of odd inputs to the upper one.
inline std::uint32_t part_nibbles(std::uint32_t x) {
  x = (x & 0xf00ff00fu) | ((x & 0x00f000f0u) << 4) | ((x & 0x0f000f00u) >> 4);
  return (x & 0xff0000ffu) | ((x & 0x0000ff00u) << 8) | ((x & 0x00ff0000u) >> 8);
}
inline std::uint32_t join_nibbles(std::uint32_t x) {
  x = (x & 0xff0000ffu) | ((x & 0x0000ff00u) << 8) | ((x & 0x00ff0000u) >> 8);
  return (x & 0xf00ff00fu) | ((x & 0x00f000f0u) << 4) | ((x & 0x0f000f00u) >> 4);
}

// The block of a group, to or from the words of its sixteen rows, `stride` words from row to row.
template <Format format, bool back>
inline void convert_block(std::uint32_t* rows, std::int64_t stride, std::uint32_t* block) {
  constexpr int words = group_inputs * bits_of(format) / 32;
  for (int lane = 0; lane < strip_outputs; ++lane)
    for (int w = 0; w < words; ++w) {
      std::uint32_t& stored = rows[lane * stride + w];
      if constexpr (format == Format::float8) {
        auto* halves = reinterpret_cast<std::uint8_t*>(block + w * strip_outputs) + 2 * lane;
        if constexpr (back) {
          stored = static_cast<std::uint32_t>(halves[0] | halves[32] << 8 | halves[1] << 16) |
                   static_cast<std::uint32_t>(halves[33]) << 24;
        } else {
          halves[0] = static_cast<std::uint8_t>(stored);
          halves[32] = static_cast<std::uint8_t>(stored >> 8);
          halves[1] = static_cast<std::uint8_t>(stored >> 16);
          halves[33] = static_cast<std::uint8_t>(stored >> 24);
        }
      } else {
        std::uint32_t& packed = block[w * strip_outputs + lane];
        constexpr bool nibbles = format == Format::float4;
        if constexpr (back) stored = nibbles ? join_nibbles(packed) : packed;
        else packed = nibbles ? part_nibbles(stored) : stored;
      }
    }
}

// A strip of `count` rows of `row_bytes`, to or from its blocks; `spare` holds sixteen rows filled up to whole groups.
template <Format format, bool back>
inline void convert_strip(std::uint8_t* stored, std::int64_t row_bytes, std::int64_t count, std::int64_t groups,
                          std::uint32_t* blocks, std::uint32_t* spare) {
  constexpr int words = group_inputs * bits_of(format) / 32;
  const std::int64_t stride = groups * words;
  if constexpr (!back) {
    std::memset(spare, 0, static_cast<std::size_t>(stride * 4 * strip_outputs));
    for (std::int64_t r = 0; r < count; ++r)
      std::memcpy(spare + r * stride, stored + r * row_bytes, static_cast<std::size_t>(row_bytes));
  }
  for (std::int64_t g = 0; g < groups; ++g)
    convert_block<format, back>(spare + g * words, stride, blocks + g * words * strip_outputs);
  if constexpr (back)
    for (std::int64_t r = 0; r < count; ++r)
      std::memcpy(stored + r * row_bytes, spare + r * stride, static_cast<std::size_t>(row_bytes));
}

template <bool back>
inline void convert_strip(Format format, std::uint8_t* stored, std::int64_t row_bytes, std::int64_t count,
                          std::int64_t groups, std::uint32_t* blocks, std::uint32_t* spare) {
  switch (format) {
    case Format::float32:
      convert_strip<Format::float32, back>(stored, row_bytes, count, groups, blocks, spare);
      break;
    case Format::bfloat16:
      convert_strip<Format::bfloat16, back>(stored, row_bytes, count, groups, blocks, spare);
      break;
    case Format::float8: convert_strip<Format::float8, back>(stored, row_bytes, count, groups, blocks, spare); break;
    case Format::float4: convert_strip<Format::float4, back>(stored, row_bytes, count, groups, blocks, spare); break;
  }
}

}  // namespace abyssal::ABYSSAL_ISA
