// exp(x) for x <= 0: what a softmax needs.
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

// 2^n, where n + 1.5 * 2^23 is given, for n from -126 to 0; 0 for n = -127.
inline Lanes power_of_two(Lanes shifted) {
#if ABYSSAL_ISA_avx512
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 23))};
#elif ABYSSAL_ISA_avx2
  const __m256i more = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted.lo), more), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted.hi), more), 23))};
#elif ABYSSAL_ISA_neon
  Lanes out;
  for (int i = 0; i < 4; ++i)
    out.v[i] = vreinterpretq_f32_u32(
        vshlq_n_u32(vaddq_u32(vreinterpretq_u32_f32(shifted.v[i]), vdupq_n_u32(127)), 23));
  return out;
#else
  Lanes out;
  for (int i = 0; i < lanes; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &shifted.v[i], sizeof bits);
    bits = (bits + 127) << 23;
    std::memcpy(&out.v[i], &bits, sizeof bits);
  }
  return out;
#endif
}

// exp(x) to 2^-22 relative, for x <= 0; 0 where it is below 2^-126, NaN where x is NaN. Polynomial: Cephes, expf.
inline Lanes exp_falling(Lanes x) {
  x = larger(all(-88.0f), x);  // in this order NaN stays
  const Lanes shift = all(12582912.0f);
  const Lanes shifted = fma(x, all(1.44269504f), shift);
  const Lanes n = sub(shifted, shift);
  Lanes r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Lanes p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), all(1.0f));
  return mul(p, power_of_two(shifted));
}

inline float exp_falling(float x) {
  float out[lanes];
  store(out, exp_falling(all(x)));
  return out[0];
}

}  // namespace abyssal::ABYSSAL_ISA
