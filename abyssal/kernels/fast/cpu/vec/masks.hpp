// Comparisons of lanes.
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

// Bit i is set unless a[i] <= b[i]: where a is larger, or one of the two is NaN.
inline std::uint32_t not_below(Lanes a, Lanes b) {
#if ABYSSAL_ISA_avx512
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
#elif ABYSSAL_ISA_avx2
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLE_UQ)) |
                                    _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLE_UQ)) << 8);
#else
  float x[lanes], y[lanes];
  store(x, a);
  store(y, b);
  std::uint32_t bits = 0;
  for (int i = 0; i < lanes; ++i) bits |= (x[i] <= y[i] ? 0u : 1u) << i;
  return bits;
#endif
}

}  // namespace abyssal::ABYSSAL_ISA
