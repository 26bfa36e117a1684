#pragma once

#include <cstdint>

namespace abyssal {

// Tokens of one sequence in a pass.
struct Span {
  std::int64_t first;   // row of the first of them
  std::int64_t length;  // how many
  std::int64_t start;   // position of the first of them
  std::int64_t since;   // first position whose ring rows are present
  std::int64_t slot;
  std::int64_t known;   // blocks that end at or before this position are stored already
};

}  // namespace abyssal
