#include "ops/read.hpp"

#include <cstring>

#include "parallel.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {
constexpr std::int64_t piece = 1 << 18;
}

void read(const ReadArgs& a) {
  const std::int64_t lines = a.bytes / 64;
  const std::int64_t tasks = (lines * 64 + piece - 1) / piece;
  std::uint64_t total = 0;
  parallel(tasks, [&](std::int64_t t) {
    const std::int64_t first = t * (piece / 64), last = first + piece / 64 < lines ? first + piece / 64 : lines;
    std::uint64_t sums[16] = {};
    for (std::int64_t line = first; line < last; ++line) {
      std::uint64_t words[8];
      std::memcpy(words, a.data + line * 64, 64);
      for (int i = 0; i < 8; ++i) sums[i + (line & 1) * 8] += words[i];
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t part : sums) sum += part;
    __atomic_fetch_add(&total, sum, __ATOMIC_RELAXED);
  });
  *a.sum = total;
}

}  // namespace abyssal::ABYSSAL_ISA
