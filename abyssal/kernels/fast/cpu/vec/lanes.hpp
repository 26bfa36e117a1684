// Sixteen float32 lanes: one register of AVX-512, two of AVX2, four of NEON, an array in plain C++.
//
// Kernels are written once, in terms of `Lanes`. Every operation rounds as IEEE 754 says, and `sum` and `largest`
// join lanes in one order, so that all instruction sets give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if ABYSSAL_ISA_avx512
#include "vec/lanes_avx512.hpp"
#elif ABYSSAL_ISA_avx2
#include "vec/lanes_avx2.hpp"
#elif ABYSSAL_ISA_neon
#include "vec/lanes_neon.hpp"
#else
#include "vec/lanes_scalar.hpp"
#endif

namespace abyssal::ABYSSAL_ISA {

constexpr int lanes = 16;

// The first `count` values, zeros behind them.
inline Lanes load_some(const float* from, int count) {
  float values[lanes] = {};
  std::memcpy(values, from, static_cast<std::size_t>(count) * sizeof(float));
  return load(values);
}

inline void store_some(float* to, Lanes x, int count) {
  float values[lanes];
  store(values, x);
  std::memcpy(to, values, static_cast<std::size_t>(count) * sizeof(float));
}

// Nearest bfloat16, ties to even; NaN stays NaN.
inline std::uint16_t to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The first `count` values, rounded.
inline void store_bfloat16(std::uint16_t* to, Lanes x, int count = lanes) {
  float values[lanes];
  store(values, x);
  for (int i = 0; i < count; ++i) to[i] = to_bfloat16(values[i]);
}

}  // namespace abyssal::ABYSSAL_ISA
