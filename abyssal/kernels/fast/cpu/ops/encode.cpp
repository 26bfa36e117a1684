#include "ops/encode.hpp"

#include "parallel.hpp"
#include "vec/round.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t entry_block = 64, key_block = 32;  // values that share a scale
constexpr std::int64_t task_values = 1 << 13;             // of one task

inline std::uint8_t scale_byte(float scale) {
  return scale != scale ? std::uint8_t{255} : static_cast<std::uint8_t>(bits_of(scale) >> 23);
}

// A number of the format as its code: above the smallest normal number a shifted float, below it a count of steps.
template <class F>
inline std::uint8_t code_of(float value) {
  constexpr int digits = F::digits - 1, exponent = F::digits == 4 ? 120 : 126, sign = F::digits == 4 ? 7 : 3;
  const std::uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  const std::uint32_t code = of_bits(size) < F::smallest
                                 ? static_cast<std::uint32_t>(of_bits(size) * ((1 << digits) / F::smallest))
                                 : (size - (std::uint32_t{exponent} << 23)) >> (23 - digits);
  return static_cast<std::uint8_t>(code | (bits >> 31 << sign));
}

void pack_entry(const float* x, const Rows& to, std::uint8_t* out) {
  const std::int64_t plain = to.dim - to.rotated;
  std::uint8_t* scales = out + plain + 2 * to.rotated;
  for (std::int64_t first = 0; first < plain; first += entry_block) {
    const std::int64_t count = plain - first < entry_block ? plain - first : entry_block;
    const float scale = scale_of<E4m3>(x + first, count);
    *scales++ = scale_byte(scale);
    for (std::int64_t i = first; i < first + count; ++i)
      out[i] = scale != scale ? std::uint8_t{0x7f} : code_of<E4m3>(nearest<E4m3>(x[i] / scale));
  }
  for (std::int64_t i = 0; i < to.rotated; ++i) {
    const std::uint16_t half = to_bfloat16(x[plain + i]);
    std::memcpy(out + plain + 2 * i, &half, sizeof half);
  }
  while (scales < out + to.bytes) *scales++ = 0;
}

void pack_key(const float* x, const Rows& to, std::uint8_t* out) {
  std::uint8_t* scales = out + to.dim / 2;
  for (std::int64_t first = 0; first < to.dim; first += key_block) {
    const std::int64_t count = to.dim - first < key_block ? to.dim - first : key_block;
    const float scale = scale_of<E2m1>(x + first, count);
    *scales++ = scale_byte(scale);
    for (std::int64_t i = first; i < first + count; i += 2) {
      const float low = x[i] / scale, high = x[i + 1] / scale;
      out[i / 2] = scale != scale ? std::uint8_t{0}
                                  : static_cast<std::uint8_t>(code_of<E2m1>(nearest<E2m1>(low)) |
                                                              code_of<E2m1>(nearest<E2m1>(high)) << 4);
    }
  }
}

void encode_row(const EncodeArgs& a, const float* x, std::uint8_t* out) {
  if (a.to.stored == Stored::entry) {
    pack_entry(x, a.to, out);
  } else if (a.to.stored == Stored::key) {
    pack_key(x, a.to, out);
  } else {
    auto* y = reinterpret_cast<float*>(out);
    const std::int64_t plain = a.key ? a.to.dim : a.to.dim - a.to.rotated;
    if (a.key) round_row<E2m1>(x, y, plain, key_block);
    else round_row<E4m3>(x, y, plain, entry_block);
    for (std::int64_t i = plain; i < a.to.dim; ++i) y[i] = from_bfloat16(to_bfloat16(x[i]));
  }
}

}  // namespace

void encode(const EncodeArgs& a) {
  const std::int64_t dim = a.to.dim, step = dim >= task_values || dim == 0 ? 1 : task_values / dim;
  parallel((a.rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * step < a.rows ? (task + 1) * step : a.rows;
    for (std::int64_t row = task * step; row < stop; ++row) {
      const std::int64_t place = a.places == nullptr ? row : a.places[row];
      if (place >= 0) encode_row(a, a.x + row * dim, a.data + place * a.to.bytes);
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
