#include "ops/encode.hpp"

#include "parallel.hpp"
#include "vec/round.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t task_values = 1 << 14;  // of one task: less is done before another thread has woken
constexpr std::int64_t entry_block = 64, key_block = 32;  // values that share a scale

// A number of the format as its code.
inline std::uint8_t code_of_e4m3(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u;
  const float size = of_bits(bits & 0x7fffffffu);
  const std::uint32_t normal = ((bits & 0x7fffffffu) >> 20) - (120u << 3), small = static_cast<std::uint32_t>(size * 0x1p9f);
  return static_cast<std::uint8_t>(sign | (size < E4m3::smallest ? small : normal));
}
inline std::uint8_t code_of_e2m1(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 28 & 8u;
  const float size = of_bits(bits & 0x7fffffffu);
  const std::uint32_t normal = ((bits & 0x7fffffffu) >> 22) - 252u, small = static_cast<std::uint32_t>(size * 2.0f);
  return static_cast<std::uint8_t>(sign | (size < E2m1::smallest ? small : normal));
}

// The scale of a block; NaN if it holds NaN or infinity.
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

inline std::uint8_t byte_of(float scale) {
  return scale != scale ? std::uint8_t{255} : static_cast<std::uint8_t>(bits_of(scale) >> 23);
}

void encode_entry(const EncodeArgs& a, const float* x, std::uint8_t* y) {
  const std::int64_t plain = a.dim - a.rotated;
  std::uint8_t* scales = y + plain + 2 * a.rotated;
  for (std::int64_t first = 0; first < plain; first += entry_block) {
    const std::int64_t stop = first + entry_block < plain ? first + entry_block : plain;
    const float scale = scale_of<E4m3>(x + first, stop - first);
    *scales++ = byte_of(scale);
    for (std::int64_t i = first; i < stop; ++i)
      y[i] = scale != scale ? std::uint8_t{0x7f} : code_of_e4m3(nearest<E4m3>(x[i] / scale));
  }
  for (std::int64_t i = 0; i < a.rotated; ++i) {
    const std::uint16_t half = to_bfloat16(x[plain + i]);
    std::memcpy(y + plain + 2 * i, &half, sizeof half);
  }
  while (scales < y + a.bytes) *scales++ = 0;
}

void encode_key(const EncodeArgs& a, const float* x, std::uint8_t* y) {
  std::uint8_t* scales = y + a.dim / 2;
  for (std::int64_t first = 0; first < a.dim; first += key_block) {
    const std::int64_t stop = first + key_block < a.dim ? first + key_block : a.dim;
    const float scale = scale_of<E2m1>(x + first, stop - first);
    *scales++ = byte_of(scale);
    for (std::int64_t i = first; i < stop; i += 2) {
      const float low = nearest<E2m1>(x[i] / scale), high = nearest<E2m1>(x[i + 1] / scale);
      const int both = code_of_e2m1(low) | code_of_e2m1(high) << 4;
      y[i / 2] = scale != scale ? std::uint8_t{0} : static_cast<std::uint8_t>(both);
    }
  }
}

}  // namespace

void encode(const EncodeArgs& a) {
  if (a.rows == 0) return;
  const std::int64_t step = a.dim >= task_values ? 1 : task_values / (a.dim < 1 ? 1 : a.dim);
  parallel((a.rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (std::int64_t row = task * step; row < stop; ++row) {
      if (a.key) encode_key(a, a.x + row * a.dim, a.y + row * a.bytes);
      else encode_entry(a, a.x + row * a.dim, a.y + row * a.bytes);
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
