// encode: vectors as the cache stores them, to the byte as abyssal.quant.entry.
#pragma once

#include <cstdint>

namespace abyssal {

struct EncodeArgs {
  bool key;  // an index key, else an entry
  std::int64_t rows, dim, rotated, bytes;
  const float* x;   // [rows, dim]
  std::uint8_t* y;  // [rows, bytes]
};

}  // namespace abyssal
