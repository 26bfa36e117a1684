// exp, sigmoid and log(1 + x), from additions, products and fused multiply-adds that round alike on every instruction
// set. Relative errors: exp 2, sigmoid 3, log1p 4 units of 2^-23 (tests/kernels/test_native_experts.py and others).
#pragma once

#include "vec/lanes.hpp"

namespace abyssal::ABYSSAL_ISA {

// The same operations on one number, for code that is written once for `float` and `Lanes`.
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float mul(float a, float b) { return a * b; }
inline float div(float a, float b) { return a / b; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
template <class V>
inline V same(float x);
template <>
inline float same<float>(float x) { return x; }
template <>
inline Lanes same<Lanes>(float x) { return all(x); }

// e^x: 2^n e^r with |r| <= ln(2) / 2, and the series of e^r to the seventh power. NaN stays NaN; subnormal results
// are right, since 2^n is multiplied in two steps.
inline float exp(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = larger(-104.0f, x);
  x = smaller(89.0f, x);
  const float shifted = fma(x, 1.44269504088896341f, magic);
  const float n = shifted - magic;
  float r = fma(n, -0.693145751953125f, x);
  r = fma(n, -1.42860682030941723212e-6f, r);
  float p = fma(r, 1.0f / 5040, 1.0f / 720);
  p = fma(p, r, 1.0f / 120);
  p = fma(p, r, 1.0f / 24);
  p = fma(p, r, 1.0f / 6);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.0f);
  p = fma(p, r, 1.0f);
  std::int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  const std::int32_t power = (bits & 0x7fffff) - 0x400000;
  const std::int32_t half = power >> 1;
  const std::int32_t first_bits = (half + 127) * (1 << 23), second_bits = (power - half + 127) * (1 << 23);
  float first, second;
  __builtin_memcpy(&first, &first_bits, sizeof first);
  __builtin_memcpy(&second, &second_bits, sizeof second);
  return p * first * second;
}
inline Lanes exp(Lanes x) {
  float values[lanes];
  store(values, x);
  for (int i = 0; i < lanes; ++i) values[i] = exp(values[i]);
  return load(values);
}

// 1 / (1 + e^-x); at least e^-80, as the reference
template <class V>
inline V sigmoid(V x) {
  const V one = same<V>(1.0f);
  return div(one, add(exp(sub(same<V>(0.0f), larger(same<V>(-80.0f), x))), one));
}

// log(1 + x) for 0 <= x <= 1: twice the inverse hyperbolic tangent of x / (2 + x), by its series
template <class V>
inline V log1p(V x) {
  const V s = div(x, add(x, same<V>(2.0f))), square = mul(s, s);
  V p = fma(same<V>(1.0f / 15), square, same<V>(1.0f / 13));
  p = fma(p, square, same<V>(1.0f / 11));
  p = fma(p, square, same<V>(1.0f / 9));
  p = fma(p, square, same<V>(1.0f / 7));
  p = fma(p, square, same<V>(1.0f / 5));
  p = fma(p, square, same<V>(1.0f / 3));
  p = fma(p, square, same<V>(1.0f));
  return mul(add(s, s), p);
}

}  // namespace abyssal::ABYSSAL_ISA
