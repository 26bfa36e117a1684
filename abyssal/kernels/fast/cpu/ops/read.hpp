// read: every byte of an array once, at the speed of the memory; what other kernels are measured against.
#pragma once

#include <cstdint>

namespace abyssal {

struct ReadArgs {
  const std::uint8_t* data;
  std::int64_t bytes;
  std::uint64_t* sum;  // of the array's 8-byte words, modulo 2^64; the last bytes % 64 are left out
};

}  // namespace abyssal
