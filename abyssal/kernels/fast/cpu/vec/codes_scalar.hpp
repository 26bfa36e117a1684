#pragma once

namespace abyssal::ABYSSAL_ISA {

inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Bytes {
  const std::uint8_t* from;
};

struct Bfloat16 {
  static constexpr Format format = Format::bfloat16;
  static constexpr int inputs = 2, bytes = 64;
  static constexpr int side_by_side = 1;
  static constexpr float unit = 1.0f;
  using Raw = Bytes;
  static Raw load(const std::uint8_t* from) { return {from}; }
  template <int k>
  static Lanes value(Raw raw) {
    Lanes out;
    for (int lane = 0; lane < lanes; ++lane) {
      std::uint16_t bits;
      std::memcpy(&bits, raw.from + 4 * lane + 2 * k, sizeof bits);
      out.v[lane] = from_bfloat16(bits);
    }
    return out;
  }
};

struct Float8 {
  static constexpr Format format = Format::float8;
  static constexpr int inputs = 4, bytes = 64;
  static constexpr int side_by_side = 1;
  static constexpr float unit = 1.0f;
  using Raw = Bytes;
  static Raw load(const std::uint8_t* from) { return {from}; }
  static float one(std::uint32_t byte) {
    const std::uint32_t magnitude = byte & 0x7f;
    // a subnormal number is so many times 2^-9
    const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                      : float_of_bits((magnitude << 20) + (120u << 23));
    return byte & 0x80 ? -value : value;
  }
  template <int k>
  static Lanes value(Raw raw) {
    Lanes out;
    for (int lane = 0; lane < lanes; ++lane) out.v[lane] = one(raw.from[k % 2 * 32 + 2 * lane + k / 2]);
    return out;
  }
};

struct Float4 {
  static constexpr Format format = Format::float4;
  static constexpr int inputs = 8, bytes = 64;
  static constexpr int side_by_side = 1;
  static constexpr float unit = 1.0f;
  using Raw = Bytes;
  static Raw load(const std::uint8_t* from) { return {from}; }
  template <int k>
  static Lanes value(Raw raw) {
    static const float table[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    constexpr int nibble = k / 2 + k % 2 * 4;
    Lanes out;
    for (int lane = 0; lane < lanes; ++lane)
      out.v[lane] = table[(raw.from[4 * lane + nibble / 2] >> (nibble % 2 * 4)) & 15];
    return out;
  }
};

// Scales 2^(byte - 127) of sixteen outputs; 255 is NaN.
inline Lanes load_scales(const std::uint8_t* from) {
  Lanes out;
  for (int lane = 0; lane < lanes; ++lane) {
    const std::uint32_t byte = from[lane];
    out.v[lane] = float_of_bits(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : byte << 23);
  }
  return out;
}

}  // namespace abyssal::ABYSSAL_ISA
