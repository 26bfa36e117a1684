// Stored vectors of the cache (abyssal/quant/entry.py), and the page table that says where a block lies.
#pragma once

#include <cstdint>

namespace abyssal {

enum class Stored {
  float32,   // values
  bfloat16,  // values
  entry,     // FP8 in blocks of 64, then bfloat16, then a scale byte for each block
  key,       // FP4, then a scale byte for 32 values
};

// Rows of an array of the cache.
struct Rows {
  Stored stored;
  const std::uint8_t* data;
  std::int64_t bytes;    // of a row
  std::int64_t dim;      // values of a row
  std::int64_t rotated;  // entry: values at the end that are bfloat16
};

// Blocks of sequences in pages: block b of sequence g lies in row 1 + tables[g][b / per_page] * per_page + b % per_page.
struct Pages {
  std::int64_t per_page;
  std::int64_t most;           // columns of `tables`
  const std::int64_t* tables;  // [sequences, most]
};

}  // namespace abyssal
