#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace abyssal::ABYSSAL_ISA {

// Rows and strips of a tile that fit into the registers.
constexpr int tile_rows = 6, tile_strips = 1;

struct Lanes {
  float32x4_t v[4];
};

#define ABYSSAL_EACH(expression)         \
  Lanes out;                             \
  for (int i = 0; i < 4; ++i) out.v[i] = (expression); \
  return out

inline Lanes zeros() { ABYSSAL_EACH(vdupq_n_f32(0.0f)); }
inline Lanes all(float x) { ABYSSAL_EACH(vdupq_n_f32(x)); }
inline Lanes load(const float* from) { ABYSSAL_EACH(vld1q_f32(from + 4 * i)); }
inline Lanes load_bfloat16(const std::uint16_t* from) {
  ABYSSAL_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)));
}
inline void store(float* to, Lanes x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, x.v[i]);
}

inline Lanes add(Lanes a, Lanes b) { ABYSSAL_EACH(vaddq_f32(a.v[i], b.v[i])); }
inline Lanes sub(Lanes a, Lanes b) { ABYSSAL_EACH(vsubq_f32(a.v[i], b.v[i])); }
inline Lanes mul(Lanes a, Lanes b) { ABYSSAL_EACH(vmulq_f32(a.v[i], b.v[i])); }
inline Lanes div(Lanes a, Lanes b) { ABYSSAL_EACH(vdivq_f32(a.v[i], b.v[i])); }
inline Lanes root(Lanes a) { ABYSSAL_EACH(vsqrtq_f32(a.v[i])); }
// a * b + c, rounded once
inline Lanes fma(Lanes a, Lanes b, Lanes c) { ABYSSAL_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// the second where one is NaN, as x86's instruction
inline Lanes larger(Lanes a, Lanes b) { ABYSSAL_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline Lanes smaller(Lanes a, Lanes b) { ABYSSAL_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }

#undef ABYSSAL_EACH

// lane i with lane i + 8, then i + 4, i + 2, i + 1
inline float sum(Lanes x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float largest(Lanes x) {
  float values[16];
  store(values, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) values[i] = values[i] > values[i + half] ? values[i] : values[i + half];
  return values[0];
}

}  // namespace abyssal::ABYSSAL_ISA
