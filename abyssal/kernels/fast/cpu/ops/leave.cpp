#include "ops/streams.hpp"

#include "parallel.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t block_tokens = 16;  // of a task

void leave_token(const LeaveArgs& a, std::int64_t token) {
  const std::int64_t n = a.streams, width = a.width;
  const float* y = a.y + token * width;
  const float* x = a.x + token * n * width;
  const float* post = a.post + token * n;
  const float* mix = a.mix + token * n * n;
  float* out = a.out + token * n * width;
  for (std::int64_t i = 0; i < width; i += lanes) {
    Lanes stream[most_streams];
    for (std::int64_t j = 0; j < n; ++j) stream[j] = load_at(x + j * width, i, width);
    const Lanes added = load_at(y, i, width);
    for (std::int64_t k = 0; k < n; ++k) {
      Lanes total = mul(added, all(post[k]));
      for (std::int64_t j = 0; j < n; ++j) total = fma(stream[j], all(mix[j * n + k]), total);
      store_at(out + k * width, i, width, total);
    }
  }
}

}  // namespace

void leave(const LeaveArgs& a) {
  const std::int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  if (blocks == 0) return;
  parallel(blocks, [&](std::int64_t block) {
    const std::int64_t stop = (block + 1) * block_tokens < a.tokens ? (block + 1) * block_tokens : a.tokens;
    for (std::int64_t token = block * block_tokens; token < stop; ++token) leave_token(a, token);
  });
}

}  // namespace abyssal::ABYSSAL_ISA
