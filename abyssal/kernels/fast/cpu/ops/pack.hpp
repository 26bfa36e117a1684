// pack and unpack: a stored matrix [outputs, inputs] to blocks and back (weight.hpp). Edges are filled with zeros.
//
// Inside a block, with lanes for outputs:
//   float32   [32 inputs][16 lanes]
//   bfloat16  [16 pairs of inputs][16 lanes], the first input of a pair in the lower half of a word of 32 bits
//   float8    [8 times 4 inputs][2 halves][16 lanes] words of 16 bits: input 4c + 2b + h is byte b in half h
//   float4    [4 times 8 inputs][16 lanes] words of 32 bits: input 8c + 2k is nibble k, input 8c + 2k + 1 nibble 4 + k
#pragma once

#include <cstdint>

#include "ops/weight.hpp"

namespace abyssal {

struct PackArgs {
  Format format;
  std::int64_t matrices;         // that lie one after another, each [outputs, inputs]
  std::int64_t outputs, inputs;  // float4: inputs is even
  std::uint8_t* stored;          // row-major
  std::uint8_t* packed;          // may be `stored` itself, if outputs % 16 and inputs % 32 are 0
  bool back;                     // from `packed` to `stored`
  // float4's scales: [outputs, inputs / 32] stored, [strips][groups][16] packed; null: they stay where they are
  std::uint8_t* stored_scales;
  std::uint8_t* packed_scales;
};

}  // namespace abyssal
