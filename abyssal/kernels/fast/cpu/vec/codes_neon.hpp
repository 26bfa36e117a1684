#pragma once

namespace abyssal::ABYSSAL_ISA {

struct Bfloat16 {
  static constexpr Format format = Format::bfloat16;
  static constexpr int inputs = 2, bytes = 64;
  static constexpr int side_by_side = 4;
  static constexpr float unit = 1.0f;
  struct Raw {
    uint32x4_t v[4];
  };
  static Raw load(const std::uint8_t* from) {
    Raw raw;
    for (int i = 0; i < 4; ++i) raw.v[i] = vreinterpretq_u32_u8(vld1q_u8(from + 16 * i));
    return raw;
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    Lanes out;
    for (int i = 0; i < 4; ++i)
      out.v[i] = vreinterpretq_f32_u32(k == 0 ? vshlq_n_u32(raw.v[i], 16)
                                              : vandq_u32(raw.v[i], vdupq_n_u32(0xffff0000u)));
    return out;
  }
};

// E4M3 bits, moved by one, are those of a half 2^8 times smaller; subnormal numbers too.
struct Float8 {
  static constexpr Format format = Format::float8;
  static constexpr int inputs = 4, bytes = 64;
  static constexpr int side_by_side = 2;
  static constexpr float unit = 256.0f;
  struct Raw {
    int16x8_t half[2][2];  // eight lanes each
  };
  static Raw load(const std::uint8_t* from) {
    Raw raw;
    for (int i = 0; i < 4; ++i) raw.half[i / 2][i % 2] = vreinterpretq_s16_u8(vld1q_u8(from + 16 * i));
    return raw;
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    Lanes out;
    for (int i = 0; i < 2; ++i) {
      const int16x8_t words = k < 2 ? vshlq_n_s16(raw.half[k % 2][i], 8) : raw.half[k % 2][i];
      const int16x8_t bits = vandq_s16(vshrq_n_s16(words, 1), vdupq_n_s16(static_cast<std::int16_t>(0xbf80)));
      out.v[2 * i] = vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(bits)));
      out.v[2 * i + 1] = vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(bits)));
    }
    return out;
  }
};

// A table of bytes gives twice the value, as an integer.
struct Float4 {
  static constexpr Format format = Format::float4;
  static constexpr int inputs = 8, bytes = 64;
  static constexpr int side_by_side = 2;
  static constexpr float unit = 0.5f;
  struct Raw {
    int32x4_t lo[4], hi[4];  // low and high nibbles of each byte, for four lanes each
  };
  static Raw load(const std::uint8_t* from) {
    static const std::int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const int8x16_t table = vld1q_s8(twice);
    Raw raw;
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t x = vld1q_u8(from + 16 * i);
      raw.lo[i] = vreinterpretq_s32_s8(vqtbl1q_s8(table, vandq_u8(x, vdupq_n_u8(15))));
      raw.hi[i] = vreinterpretq_s32_s8(vqtbl1q_s8(table, vshrq_n_u8(x, 4)));
    }
    return raw;
  }
  template <int k>
  static Lanes value(const Raw& raw) {
    constexpr int byte = k / 4 + k % 2 * 2;
    Lanes out;
    for (int i = 0; i < 4; ++i) {
      int32x4_t x = k / 2 % 2 ? raw.hi[i] : raw.lo[i];
      if constexpr (byte < 3) x = vshlq_n_s32(x, 24 - 8 * byte);
      out.v[i] = vcvtq_f32_s32(vshrq_n_s32(x, 24));
    }
    return out;
  }
};

// Scales 2^(byte - 127) of sixteen outputs; 255 is NaN.
inline Lanes load_scales(const std::uint8_t* from) {
  Lanes out;
  for (int i = 0; i < 4; ++i) {
    std::uint32_t bytes[4];
    for (int j = 0; j < 4; ++j) bytes[j] = from[4 * i + j];
    const uint32x4_t byte = vld1q_u32(bytes);
    uint32x4_t bits = vshlq_n_u32(byte, 23);
    bits = vbslq_u32(vceqzq_u32(byte), vdupq_n_u32(0x00400000u), bits);
    bits = vbslq_u32(vceqq_u32(byte, vdupq_n_u32(255)), vdupq_n_u32(0x7fc00000u), bits);
    out.v[i] = vreinterpretq_f32_u32(bits);
  }
  return out;
}

}  // namespace abyssal::ABYSSAL_ISA
