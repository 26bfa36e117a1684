// Rounding to FP8 E4M3 and FP4 E2M1 with a power-of-two scale for each block, to the bit as abyssal.quant.
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

// digits: significant binary ones; smallest: normal number; least_amax: a block's largest magnitude counts as this
struct E4m3 {
  static constexpr int digits = 4;
  static constexpr float smallest = 0x1p-6f, largest = 448.0f, least_amax = 1e-4f;
};
struct E2m1 {
  static constexpr int digits = 2;
  static constexpr float smallest = 1.0f, largest = 6.0f, least_amax = 6 * 0x1p-126f;
};

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float of_bits(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// 2^ceil(log2(x)) of a normal number; NaN of infinity and NaN
inline float power_of_two_above(float x) {
  const std::uint32_t bits = bits_of(x), exponent = bits & 0x7f800000u;
  if (exponent == 0x7f800000u) return __builtin_nanf("");
  return of_bits(exponent + ((bits & 0x7fffffu) != 0 ? 0x800000u : 0));
}

// The nearest number of the format, ties to even; beyond the largest, the largest. Not for NaN.
template <class F>
inline float nearest(float x) {
  constexpr int spare = 24 - F::digits;
  constexpr float magic = 1.5f * static_cast<float>(1 << spare) * F::smallest;  // adding it rounds to steps of subnormal numbers
  const std::uint32_t bits = bits_of(x);
  const float size = of_bits(bits & 0x7fffffffu), cut = size < F::largest ? size : F::largest;
  const std::uint32_t small = bits_of((cut + magic) - magic), whole = bits_of(cut);
  const std::uint32_t large = (whole + ((1u << (spare - 1)) - 1) + ((whole >> spare) & 1u)) & ~((1u << spare) - 1);
  return of_bits((cut < F::smallest ? small : large) | (bits & 0x80000000u));
}

// The scale of a block; NaN if one of its values is NaN or infinite.
template <class F>
inline float scale_of(const float* x, std::int64_t count) {
  float amax = 0.0f;
  int broken = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float size = of_bits(bits_of(x[i]) & 0x7fffffffu);
    amax = size > amax ? size : amax;
    broken |= x[i] != x[i];
  }
  const float floored = amax < F::least_amax ? F::least_amax : amax;
  return broken != 0 ? __builtin_nanf("") : power_of_two_above(floored / F::largest);
}

// One block.
template <class F>
inline void round_block(const float* x, float* y, std::int64_t count) {
  const float scale = scale_of<F>(x, count);
  if (scale != scale) {
    for (std::int64_t i = 0; i < count; ++i) y[i] = __builtin_nanf("");
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) y[i] = nearest<F>(x[i] / scale) * scale;
}

// A row in blocks; the last one may be shorter.
template <class F>
inline void round_row(const float* x, float* y, std::int64_t width, std::int64_t block) {
  for (std::int64_t i = 0; i < width; i += block)
    round_block<F>(x + i, y + i, width - i < block ? width - i : block);
}

}  // namespace abyssal::ABYSSAL_ISA
