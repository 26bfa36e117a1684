#pragma once

#include <cstdint>

namespace abyssal::ABYSSAL_ISA {

// Rows and strips of a tile that fit into the registers.
constexpr int tile_rows = 1, tile_strips = 1;

struct Lanes {
  float v[16];
};

#define ABYSSAL_EACH(expression)          \
  Lanes out;                              \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out

inline float lane_of_bfloat16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline Lanes zeros() { ABYSSAL_EACH(0.0f); }
inline Lanes all(float x) { ABYSSAL_EACH(x); }
inline Lanes load(const float* from) { ABYSSAL_EACH(from[i]); }
inline Lanes load_bfloat16(const std::uint16_t* from) { ABYSSAL_EACH(lane_of_bfloat16(from[i])); }
inline void store(float* to, Lanes x) {
  for (int i = 0; i < 16; ++i) to[i] = x.v[i];
}

inline Lanes add(Lanes a, Lanes b) { ABYSSAL_EACH(a.v[i] + b.v[i]); }
inline Lanes sub(Lanes a, Lanes b) { ABYSSAL_EACH(a.v[i] - b.v[i]); }
inline Lanes mul(Lanes a, Lanes b) { ABYSSAL_EACH(a.v[i] * b.v[i]); }
inline Lanes div(Lanes a, Lanes b) { ABYSSAL_EACH(a.v[i] / b.v[i]); }
inline Lanes root(Lanes a) { ABYSSAL_EACH(__builtin_sqrtf(a.v[i])); }
// a * b + c, rounded once; without the instruction this is a call into the C library
inline Lanes fma(Lanes a, Lanes b, Lanes c) { ABYSSAL_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
// the second where one is NaN, as x86's instruction
inline Lanes larger(Lanes a, Lanes b) { ABYSSAL_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Lanes smaller(Lanes a, Lanes b) { ABYSSAL_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }

#undef ABYSSAL_EACH

// lane i with lane i + 8, then i + 4, i + 2, i + 1
inline float sum(Lanes x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] + x.v[i + half];
  return x.v[0];
}
inline float largest(Lanes x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] = x.v[i] > x.v[i + half] ? x.v[i] : x.v[i + half];
  return x.v[0];
}

}  // namespace abyssal::ABYSSAL_ISA
