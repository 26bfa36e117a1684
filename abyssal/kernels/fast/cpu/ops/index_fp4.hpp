// Scores of FP4 keys against queries that are FP4 numbers too, as integers: exact, and so the bits of the float32 path.
//
// Twice an FP4 value is an integer up to 12. The groups of 32 of a vector have scales of their own; where these are at
// most 8 times apart, the vector is integers up to 96 times one power of two, its unit. Then a product of two vectors
// is one integer below 2^24 times both units, and so are all its partial sums: float32 would not round them either.
#pragma once

#include "ops/index_topk.hpp"
#include "vec/buffer.hpp"
#include "vec/lanes.hpp"

#if ABYSSAL_ISA_avx512

namespace abyssal::ABYSSAL_ISA {

constexpr std::int64_t most_whole_dim = 1024;  // times 96 * 96 stays below 2^24
constexpr int most_shift = 3;                  // between the scales of a vector
constexpr int unit_range = 30;                 // units and weights up to 2^30: nothing leaves the range of float32

// Keys in lanes, for `vectors` times sixteen keys, as bytes. The processor's product takes four dimensions at a time,
// alternately the even and the odd ones of eight: a chunk.
template <int vectors>
class KeyBytes {
 public:
  explicit KeyBytes(std::int64_t dim) : groups_(dim / 32), bytes_(dim * vectors * lanes), exponents_(groups_ * lanes) {}

  // Sixteen keys. False: one of them does not fit, and there is nothing to use.
  bool read(int vector, const std::uint8_t* const* rows) {
    const __m512i none = _mm512_set1_epi32(1000);
    __m512i least = none;
    for (std::int64_t g = 0; g < groups_; ++g) {
      if (g % 4 == 0) scale_bytes(rows, g);
      __m512i words[4];
      turn(rows, g, words);
      const __m512i any = _mm512_or_si512(_mm512_or_si512(words[0], words[1]), _mm512_or_si512(words[2], words[3]));
      // a group of zeros takes any scale but NaN
      const __m512i stored = _mm512_and_si512(_mm512_srli_epi32(four_, static_cast<unsigned>(g % 4 * 8)),
                                              _mm512_set1_epi32(255));
      const __mmask16 zero = _mm512_mask_testn_epi32_mask(_mm512_cmpneq_epi32_mask(stored, _mm512_set1_epi32(255)), any,
                                                          _mm512_set1_epi8(0x77));
      const __m512i own = _mm512_mask_mov_epi32(stored, zero, none);
      _mm512_store_si512(&exponents_[g * lanes], own);
      least = _mm512_min_epi32(least, own);
      for (int i = 0; i < 4; ++i) _mm512_store_si512(place(g * 4 + i, vector), words[i]);
    }
    least = _mm512_mask_mov_epi32(least, _mm512_cmpeq_epi32_mask(least, none), _mm512_set1_epi32(127));
    const __m512i off = _mm512_abs_epi32(_mm512_sub_epi32(least, _mm512_set1_epi32(127)));
    __mmask16 bad = _mm512_cmpgt_epi32_mask(off, _mm512_set1_epi32(unit_range));
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t g = groups_; g-- > 0;) {
      const __m512i own = _mm512_load_si512(&exponents_[g * lanes]);
      const __mmask16 zero = _mm512_cmpeq_epi32_mask(own, none);
      const __m512i shift = _mm512_mask_mov_epi32(_mm512_sub_epi32(own, least), zero, _mm512_setzero_si512());
      bad |= _mm512_cmpgt_epi32_mask(shift, _mm512_set1_epi32(most_shift));
      for (int i = 4; i-- > 0;) {
        // from the last on: a word becomes two chunks
        const __m512i word = _mm512_load_si512(place(g * 4 + i, vector));
        const __m512i even = numbers(word, shift), odd = numbers(_mm512_srli_epi16(word, 4), shift);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), even);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), odd);
        _mm512_store_si512(place(g * 8 + 2 * i, vector), even);
        _mm512_store_si512(place(g * 8 + 2 * i + 1, vector), odd);
      }
    }
    starts_[vector] = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7);
    units_[vector] = {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(least, _mm512_set1_epi32(1)), 23))};
    return bad == 0;
  }

  __m512i chunk(std::int64_t number, int vector) const { return _mm512_load_si512(place(number, vector)); }
  // -128 times the sum over a key
  __m512i start(int vector) const { return starts_[vector]; }
  Lanes unit(int vector) const { return units_[vector]; }

 private:
  // The scales of four groups from one on, or of those that are left, as the bytes of a word for each key.
  void scale_bytes(const std::uint8_t* const* rows, std::int64_t group) {
    alignas(64) std::uint32_t words[lanes] = {};
    const std::int64_t left = groups_ - group;
    for (int key = 0; key < lanes; ++key) {
      const std::uint8_t* from = rows[key] + groups_ * 16 + group;
      if (left >= 4) std::memcpy(&words[key], from, 4);
      else std::memcpy(&words[key], from, static_cast<std::size_t>(left));
    }
    four_ = _mm512_load_si512(words);
  }

  // words[i]: nibbles of dimensions 8 i .. 8 i + 7 of a group
  static void turn(const std::uint8_t* const* rows, std::int64_t group, __m512i (&words)[4]) {
    __m512i part[4];  // quarter l of part i: key 4 l + i
    for (int i = 0; i < 4; ++i) {
      const auto sixteen = [&](int key) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[key] + group * 16));
      };
      part[i] = _mm512_castsi128_si512(sixteen(i));
      part[i] = _mm512_inserti32x4(part[i], sixteen(4 + i), 1);
      part[i] = _mm512_inserti32x4(part[i], sixteen(8 + i), 2);
      part[i] = _mm512_inserti32x4(part[i], sixteen(12 + i), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpacklo_epi32(part[2], part[3]);
    const __m512i c = _mm512_unpackhi_epi32(part[0], part[1]), d = _mm512_unpackhi_epi32(part[2], part[3]);
    words[0] = _mm512_unpacklo_epi64(a, b);
    words[1] = _mm512_unpackhi_epi64(a, b);
    words[2] = _mm512_unpacklo_epi64(c, d);
    words[3] = _mm512_unpackhi_epi64(c, d);
  }

  // The lower nibbles of all bytes as integers, shifted; their signs come last, so that bytes keep apart.
  static __m512i numbers(__m512i nibbles, __m512i shift) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, 1, 2, 3, 4, 6, 8, 12));
    const __m512i sizes = _mm512_shuffle_epi8(table, _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
    const __m512i moved = _mm512_sllv_epi32(sizes, shift);
    const __mmask64 negative = _mm512_test_epi8_mask(nibbles, _mm512_set1_epi8(8));
    return _mm512_mask_sub_epi8(moved, negative, _mm512_setzero_si512(), moved);
  }

  std::int8_t* place(std::int64_t chunk, int vector) { return &bytes_[(chunk * vectors + vector) * 4 * lanes]; }
  const std::int8_t* place(std::int64_t chunk, int vector) const {
    return &bytes_[(chunk * vectors + vector) * 4 * lanes];
  }

  std::int64_t groups_;
  Buffer<std::int8_t> bytes_;
  Buffer<std::int32_t> exponents_;
  __m512i four_;
  __m512i starts_[vectors];
  Lanes units_[vectors];
};

// The heads of a query as bytes without sign, 128 more than their integers, and a factor for each head.
class QueryBytes {
 public:
  QueryBytes(const IndexTopkArgs& a, std::int64_t query)
      : heads_(a.heads), dim_(a.keys.dim), bytes_(heads_ * dim_), factors_(heads_) {
    for (std::int64_t h = 0; h < heads_ && fits_; ++h)
      fits_ = add(h, a.q + (query * heads_ + h) * dim_, a.weights[query * heads_ + h]);
  }

  // Whether the query is made for it.
  bool fits() const { return fits_; }

  // Scores of all keys: relu, weights and the sum over heads, one head after another.
  template <int vectors>
  void scores(const KeyBytes<vectors>& keys, Lanes* scores) const {
    for (int v = 0; v < vectors; ++v) scores[v] = zeros();
    std::int64_t h = 0;
    for (; h + side_by_side <= heads_; h += side_by_side) add_heads<side_by_side>(h, keys, scores);
    for (; h < heads_; ++h) add_heads<1>(h, keys, scores);
    for (int v = 0; v < vectors; ++v) scores[v] = mul(scores[v], keys.unit(v));
  }

 private:
  static constexpr int side_by_side = 4;

  template <int R, int vectors>
  void add_heads(std::int64_t head, const KeyBytes<vectors>& keys, Lanes* scores) const {
    __m512i sums[R][vectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < vectors; ++v) sums[r][v] = keys.start(v);
    const std::uint8_t* q = &bytes_[head * dim_];
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < dim_ / 4; ++i) {
      __m512i chunk[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) chunk[v] = keys.chunk(i, v);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        std::int32_t word;
        std::memcpy(&word, q + r * dim_ + 4 * i, sizeof word);
        const __m512i four = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], four, chunk[v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < vectors; ++v) {
        const Lanes x{_mm512_cvtepi32_ps(_mm512_max_epi32(sums[r][v], _mm512_setzero_si512()))};
        scores[v] = fma(all(factors_[head + r]), x, scores[v]);
      }
  }

  // A power of two by which a group of 32 becomes integers up to 15; 0 for a group of zeros, or none. False: NaN or a
  // number far from 1.
  static bool unit_of(const float* from, float& unit) {
    const __m512 sizes = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(from)), _mm512_abs_ps(_mm512_loadu_ps(from + lanes)));
    const float most = _mm512_reduce_max_ps(sizes);
    unit = 0.0f;
    if (most == 0.0f) return true;
    if (!(most >= 0x1p-20f && most <= 0x1p20f)) return false;
    std::uint32_t bits;
    std::memcpy(&bits, &most, sizeof bits);
    bits = (bits & 0x7f800000u) - (3u << 23);
    std::memcpy(&unit, &bits, sizeof unit);
    return true;
  }

  bool add(std::int64_t head, const float* from, float weight) {
    const float size = __builtin_fabsf(weight);
    if (!(size <= 0x1p30f) || (size != 0.0f && size < 0x1p-30f)) return false;
    float unit = 0.0f, most = 0.0f;
    for (std::int64_t g = 0; g < dim_ / 32; ++g) {
      float own;
      if (!unit_of(from + g * 32, own)) return false;
      if (own != 0.0f && (unit == 0.0f || own < unit)) unit = own;
      if (own > most) most = own;
    }
    if (most > unit * (1 << most_shift)) return false;
    if (unit == 0.0f) unit = 1.0f;
    factors_[head] = weight * unit;
    const __m512 back = _mm512_set1_ps(1.0f / unit);
    for (std::int64_t first = 0; first < dim_; first += lanes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(from + first), back);
      const __m512i whole = _mm512_cvttps_epi32(scaled);
      // NaN differs from every integer
      if (_mm512_cmp_ps_mask(_mm512_cvtepi32_ps(whole), scaled, _CMP_NEQ_UQ) != 0) return false;
      if (_mm512_cmpgt_epi32_mask(_mm512_abs_epi32(whole), _mm512_set1_epi32(96)) != 0) return false;
      // of eight dimensions, the even ones first
      const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(&bytes_[head * dim_ + first]), _mm_shuffle_epi8(bytes, order));
    }
    return true;
  }

  std::int64_t heads_, dim_;
  Buffer<std::uint8_t> bytes_;  // [heads, chunks, 4]
  Buffer<float> factors_;
  bool fits_ = true;
};

}  // namespace abyssal::ABYSSAL_ISA

#endif
