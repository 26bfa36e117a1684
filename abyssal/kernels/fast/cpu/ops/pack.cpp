#include "ops/pack.hpp"

#include <cstring>

#include "parallel.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr int S = strip_outputs, G = group_inputs;

// bits of an element, and the place of an input in its block: a word and a shift, for one lane
int element_bits(Format format) { return 32 >> static_cast<int>(format); }

struct Place {
  int word;  // of 32 bits, in the block
  int shift;
};

Place place_of(Format format, int input, int lane) {
  switch (format) {
    case Format::float32: return {input * S + lane, 0};
    case Format::bfloat16: return {input / 2 * S + lane, input % 2 * 16};
    case Format::float8: {
      const int chunk = input / 4, byte = input % 4 / 2, half = input % 2;
      return {chunk * S + half * (S / 2) + lane / 2, lane % 2 * 16 + byte * 8};
    }
    default: {
      const int chunk = input / 8, nibble = input % 8 / 2 + input % 2 * 4;
      return {chunk * S + lane, nibble * 4};
    }
  }
}

struct Strip {
  const PackArgs& a;
  std::int64_t row_bytes, groups;
  int block, bits;

  explicit Strip(const PackArgs& args)
      : a(args), row_bytes(args.inputs * element_bits(args.format) / 8), groups((args.inputs + G - 1) / G),
        block(static_cast<int>(block_bytes(args.format))), bits(element_bits(args.format)) {}

  // Rows of a strip, padded with zeros to whole groups, to the blocks and back.
  void convert(std::uint8_t* rows, std::uint8_t* blocks) const {
    const std::int64_t padded = groups * G * bits / 8;
    const std::uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
    Place places[G][S];
    for (int i = 0; i < G; ++i)
      for (int lane = 0; lane < S; ++lane) places[i][lane] = place_of(a.format, i, lane);
    const int per_word = 32 / bits;
    for (std::int64_t g = 0; g < groups; ++g) {
      std::uint32_t words[512] = {};
      if (a.back) std::memcpy(words, blocks + g * block, static_cast<std::size_t>(block));
      for (int lane = 0; lane < S; ++lane) {
        std::uint8_t* row = rows + lane * padded + g * G * bits / 8;
        for (int w = 0; w < G / per_word; ++w) {
          std::uint32_t stored = 0;
          if (!a.back) std::memcpy(&stored, row + 4 * w, 4);
          for (int k = 0; k < per_word; ++k) {
            const Place place = places[w * per_word + k][lane];
            if (a.back) stored |= ((words[place.word] >> place.shift) & mask) << (k * bits);
            else words[place.word] |= ((stored >> (k * bits)) & mask) << place.shift;
          }
          if (a.back) std::memcpy(row + 4 * w, &stored, 4);
        }
      }
      if (!a.back) std::memcpy(blocks + g * block, words, static_cast<std::size_t>(block));
    }
  }

  void operator()(std::int64_t matrix, std::int64_t strip) const {
    const std::int64_t strips = (a.outputs + S - 1) / S, padded = groups * G * bits / 8;
    const std::int64_t first = strip * S, here = a.outputs - first < S ? a.outputs - first : S;
    std::uint8_t* stored = a.stored + (matrix * a.outputs + first) * row_bytes;
    std::uint8_t* blocks = a.packed + (matrix * strips + strip) * groups * block;
    // a copy, since `packed` may lie where the rows do
    auto* rows = static_cast<std::uint8_t*>(__builtin_calloc(S, static_cast<std::size_t>(padded)));
    if (!a.back)
      for (std::int64_t r = 0; r < here; ++r)
        std::memcpy(rows + r * padded, stored + r * row_bytes, static_cast<std::size_t>(row_bytes));
    convert(rows, blocks);
    if (a.back)
      for (std::int64_t r = 0; r < here; ++r)
        std::memcpy(stored + r * row_bytes, rows + r * padded, static_cast<std::size_t>(row_bytes));
    __builtin_free(rows);
  }
};

}  // namespace

void pack(const PackArgs& a) {
  if (a.outputs == 0 || a.inputs == 0) return;
  const Strip strip(a);
  const std::int64_t strips = (a.outputs + S - 1) / S;
  parallel(a.matrices * strips, [&](std::int64_t t) { strip(t / strips, t % strips); });
}

}  // namespace abyssal::ABYSSAL_ISA
