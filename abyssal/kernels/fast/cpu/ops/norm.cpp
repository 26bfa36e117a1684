#include "ops/norm.hpp"

#include "parallel.hpp"
#include "vec/sums.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t task_values = 1 << 14;  // of one task: less is done before another thread has woken

void scale(const NormArgs& a, const float* x, float* y) {
  const Lanes factor = all(inverse_rms(sum_of_squares(x, a.width), a.width, a.eps));
  for (std::int64_t i = 0; i < a.width; i += lanes) {
    Lanes value = mul(load_at(x, i, a.width), factor);
    if (a.weight != nullptr) value = mul(value, load_at(a.weight, i, a.width));
    store_at(y, i, a.width, value);
  }
}

// (a + ib)(c + is): a product, and one more that is added as it is rounded. Written out, since GCC 12 fuses the plain
// form even where contraction is off.
void rotate(const NormArgs& a, std::int64_t row, float* tail) {
  const float* turn = a.turn + row / a.repeat * a.turned;
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (std::int64_t i = 0; i < a.turned; i += 2) {
    const float real = tail[i], imaginary = tail[i + 1], cosine = turn[i], sine = sign * turn[i + 1];
    tail[i] = __builtin_fmaf(real, cosine, -(imaginary * sine));
    tail[i + 1] = __builtin_fmaf(real, sine, imaginary * cosine);
  }
}

}  // namespace

void norm(const NormArgs& a) {
  if (a.rows == 0 || a.width == 0) return;
  const std::int64_t block = a.width >= task_values ? 1 : task_values / a.width;
  parallel((a.rows + block - 1) / block, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * block < a.rows ? (task + 1) * block : a.rows;
    for (std::int64_t row = task * block; row < stop; ++row) {
      const float* x = a.x + row * a.width;
      float* y = a.y + row * a.width;
      if (a.normed) scale(a, x, y);
      else if (x != y) std::memcpy(y, x, static_cast<std::size_t>(a.width) * sizeof(float));
      if (a.turn != nullptr) rotate(a, row, y + a.width - a.turned);
    }
  });
}

}  // namespace abyssal::ABYSSAL_ISA
