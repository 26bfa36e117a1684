// Products of FP4 keys with queries that are FP4 numbers too, as integers: exact, and so the bits of the float32 path.
#pragma once

#include "ops/index_topk.hpp"
#include "vec/buffer.hpp"
#include "vec/lanes.hpp"

#if ABYSSAL_ISA_avx512

namespace abyssal::ABYSSAL_ISA {

// Twice the values of keys, plus 12, are bytes without sign; a key's bytes are those of the even dimensions of all
// groups, then those of the odd ones.
class KeyBytes {
 public:
  explicit KeyBytes(std::int64_t dim) : dim_(dim), groups_(dim / 32), bytes_(lanes * dim), scales_(lanes * groups_) {}

  // Sixteen keys. False: a scale is far from 1, and the exponents of products could leave the range of float32.
  bool read(const std::uint8_t* const* rows) {
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    const __m128i mask = _mm_set1_epi8(15);
    for (int key = 0; key < lanes; ++key) {
      std::uint8_t* even = &bytes_[key * dim_];
      for (std::int64_t i = 0; i < dim_ / 2; i += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[key] + i));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(even + i), _mm_shuffle_epi8(table, _mm_and_si128(x, mask)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(even + dim_ / 2 + i),
                         _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(x, 4), mask)));
      }
      for (std::int64_t g = 0; g < groups_; ++g) {
        const int byte = rows[key][dim_ / 2 + g];
        if (byte < 127 - 40 || byte > 127 + 40) return false;
        const std::uint32_t bits = static_cast<std::uint32_t>(byte - 1) << 23;  // half of it
        std::memcpy(&scales_[key * groups_ + g], &bits, sizeof bits);
      }
    }
    return true;
  }
  // Four dimensions of a key: `chunk` from 0 to dim / 4 - 1.
  __m512i four(int key, std::int64_t chunk) const {
    std::int32_t word;
    std::memcpy(&word, &bytes_[key * dim_ + 4 * chunk], sizeof word);
    return _mm512_set1_epi32(word);
  }
  float scale(int key, std::int64_t group) const { return scales_[key * groups_ + group]; }

 private:
  std::int64_t dim_, groups_;
  Buffer<std::uint8_t> bytes_;
  Buffer<float> scales_;
};

// The heads of a query in lanes, as bytes and a unit for each head and group.
class QueryBytes {
 public:
  QueryBytes(const IndexTopkArgs& a, std::int64_t query)
      : dim_(a.keys.dim), groups_(dim_ / 32), blocks_((a.heads + lanes - 1) / lanes), bytes_(blocks_ * dim_ * lanes),
        starts_(blocks_ * groups_ * lanes), units_(blocks_ * groups_ * lanes) {
    for (std::int64_t h = 0; h < blocks_ * lanes && fits_; ++h)
      for (std::int64_t g = 0; g < groups_ && fits_; ++g)
        fits_ = add(h, g, h < a.heads ? a.q + (query * a.heads + h) * dim_ + g * 32 : nullptr);
  }

  // Whether the query consists of such numbers.
  bool fits() const { return fits_; }

  // Products of sixteen heads with K keys from one on.
  template <int K>
  void products(const KeyBytes& keys, int first, std::int64_t block, float* to) const {
    Lanes total[K];
    for (std::int64_t g = 0; g < groups_; ++g) {
      const std::int64_t place = (block * groups_ + g) * lanes;
      __m512i sums[K];
      for (int k = 0; k < K; ++k) sums[k] = _mm512_loadu_si512(&starts_[place]);
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) {
          const std::int64_t chunk = half * groups_ * 4 + g * 4 + i;
          const __m512i heads = _mm512_loadu_si512(&bytes_[(block * dim_ / 4 + chunk) * 4 * lanes]);
          for (int k = 0; k < K; ++k) sums[k] = _mm512_dpbusd_epi32(sums[k], keys.four(first + k, chunk), heads);
        }
      const Lanes unit = load(&units_[place]);
      for (int k = 0; k < K; ++k) {
        const Lanes x = mul(Lanes{_mm512_cvtepi32_ps(sums[k])}, mul(unit, all(keys.scale(first + k, g))));
        total[k] = g == 0 ? x : abyssal::ABYSSAL_ISA::add(total[k], x);
      }
    }
    for (int k = 0; k < K; ++k) store(to + k * lanes, total[k]);
  }

 private:
  // A head's group of 32: integers from -12 to 12 times a power of two, or it does not fit.
  bool add(std::int64_t head, std::int64_t group, const float* from) {
    float most = 0.0f;
    for (int i = 0; from != nullptr && i < 32; ++i) {
      const float size = __builtin_fabsf(from[i]);
      if (!(size <= 0x1p40f)) return false;
      most = size > most ? size : most;
    }
    float unit = 1.0f;
    if (most > 0.0f) {
      std::uint32_t bits;
      std::memcpy(&bits, &most, sizeof bits);
      bits = (bits & 0x7f800000u) - (3u << 23);  // the largest becomes 8 to 15
      if (most < 0x1p-40f) return false;
      std::memcpy(&unit, &bits, sizeof bits);
    }
    const std::int64_t block = head / lanes, lane = head % lanes;
    std::int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
      const float scaled = from == nullptr ? 0.0f : from[i] / unit;
      const auto whole = static_cast<std::int32_t>(scaled);
      if (static_cast<float>(whole) != scaled || whole > 12 || whole < -12) return false;
      // even dimensions of all groups first
      const std::int64_t place = i % 2 * dim_ / 2 + group * 16 + i / 2;
      bytes_[(block * dim_ / 4 + place / 4) * 4 * lanes + lane * 4 + place % 4] = static_cast<std::int8_t>(whole);
      sum += whole;
    }
    starts_[(block * groups_ + group) * lanes + lane] = -12 * sum;
    units_[(block * groups_ + group) * lanes + lane] = unit;
    return true;
  }

  std::int64_t dim_, groups_, blocks_;
  Buffer<std::int8_t> bytes_;
  Buffer<std::int32_t> starts_;
  Buffer<float> units_;
  bool fits_ = true;
};

}  // namespace abyssal::ABYSSAL_ISA

#endif
