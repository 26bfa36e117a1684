// encode: vectors as the cache stores them, to the bit as abyssal.quant.entry (architecture.md 4.1).
#pragma once

#include "ops/rows.hpp"

namespace abyssal {

struct EncodeArgs {
  std::int64_t rows;
  const float* x;              // [rows, to.dim]
  bool key;                    // index keys, else entries
  Rows to;                     // float32: rounded as packing would, but kept as values; else packed
  std::uint8_t* data;          // what `to.data` reads
  const std::int64_t* places;  // [rows] where each goes, -1 for nowhere; null: one after another
};

}  // namespace abyssal
