// Stored numbers of a block (ops/pack.hpp) as float32 lanes, a chunk of a few inputs at a time.
//
// Each format is a struct:
//   inputs, bytes      of a chunk
//   side_by_side       groups of one row that are summed at once, as many as fit into the registers
//   unit               what the values must be multiplied by, a power of two: integers and halves come cheaper
//   Raw load(bytes)    a chunk
//   value<k>(raw)      input k of the chunk, for sixteen outputs
#pragma once

#include "ops/weight.hpp"
#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

struct Float32 {
  static constexpr Format format = Format::float32;
  static constexpr int inputs = 2, bytes = 128;
#if ABYSSAL_ISA_avx512
  static constexpr int side_by_side = 8;
#elif ABYSSAL_ISA_scalar
  static constexpr int side_by_side = 1;
#else
  static constexpr int side_by_side = 4;
#endif
  static constexpr float unit = 1.0f;
  struct Raw {
    Lanes pair[2];
  };
  static Raw load(const std::uint8_t* from) {
    const auto* values = reinterpret_cast<const float*>(from);
    return {{abyssal::ABYSSAL_ISA::load(values), abyssal::ABYSSAL_ISA::load(values + lanes)}};
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    return raw.pair[k];
  }
};

}  // namespace abyssal::ABYSSAL_ISA

#if ABYSSAL_ISA_avx512
#include "vec/codes_avx512.hpp"
#elif ABYSSAL_ISA_avx2
#include "vec/codes_avx2.hpp"
#elif ABYSSAL_ISA_neon
#include "vec/codes_neon.hpp"
#else
#include "vec/codes_scalar.hpp"
#endif
