#include "ops/streams.hpp"

#include "parallel.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t block_tokens = 16;  // of a task

template <int most>
inline void token_backward(const LeaveBackwardArgs& a, std::int64_t token, int n) {
  const std::int64_t width = a.width;
  const float* y = a.y + token * width;
  const float* x = a.x + token * n * width;
  const float* dout = a.dout + token * n * width;
  const float* post = a.post + token * n;
  const float* mix = a.mix + token * n * n;
  Lanes posts[most], mixes[most * most];
  for (int k = 0; k < n; ++k) posts[k] = zeros();
  for (int i = 0; i < n * n; ++i) mixes[i] = zeros();
  for (std::int64_t i = 0; i < width; i += lanes) {
    Lanes grad[most];
    for (int k = 0; k < n; ++k) grad[k] = load_at(dout + k * width, i, width);
    const Lanes added = load_at(y, i, width);
    Lanes total = zeros();
    for (int k = 0; k < n; ++k) {
      total = fma(grad[k], all(post[k]), total);
      posts[k] = fma(grad[k], added, posts[k]);
    }
    store_at(a.dy + token * width, i, width, total);
    for (int j = 0; j < n; ++j) {
      const Lanes stream = load_at(x + j * width, i, width);
      total = zeros();
      for (int k = 0; k < n; ++k) {
        total = fma(grad[k], all(mix[j * n + k]), total);
        mixes[j * n + k] = fma(grad[k], stream, mixes[j * n + k]);
      }
      store_at(a.dx + (token * n + j) * width, i, width, total);
    }
  }
  for (int k = 0; k < n; ++k) a.dpost[token * n + k] = sum(posts[k]);
  for (int i = 0; i < n * n; ++i) a.dmix[token * n * n + i] = sum(mixes[i]);
}

}  // namespace

void leave_backward(const LeaveBackwardArgs& a) {
  const std::int64_t blocks = (a.tokens + block_tokens - 1) / block_tokens;
  if (blocks == 0) return;
  parallel(blocks, [&](std::int64_t block) {
    const std::int64_t stop = (block + 1) * block_tokens < a.tokens ? (block + 1) * block_tokens : a.tokens;
    for (std::int64_t token = block * block_tokens; token < stop; ++token) {
      if (a.streams == 4) token_backward<4>(a, token, 4);  // a constant, for the compiler
      else token_backward<most_streams>(a, token, static_cast<int>(a.streams));
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
