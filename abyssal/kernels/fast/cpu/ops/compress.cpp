#include "ops/compress.hpp"

#include <cstring>

#include "ops/unpack_row.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/falling.hpp"
#include "vec/turn.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t small_work = 1 << 16;  // values that do not pay for a second thread

struct Slot {
  const float* values;
  const float* logits;
  const float* bias;  // null if the logits have it
};

inline Lanes some(const float* from, int count) { return count == lanes ? load(from) : load_some(from, count); }

inline Lanes logit(const Slot& slot, std::int64_t c, int count) {
  const Lanes x = some(slot.logits + c, count);
  return slot.bias == nullptr ? x : add(x, some(slot.bias + c, count));
}

struct Step {
  const CompressArgs& a;
  std::int64_t width;

  explicit Step(const CompressArgs& args) : a(args), width(args.overlap ? 2 * args.dim : args.dim) {}

  // The token at a position, from a channel on.
  Slot slot_of(const Span& span, std::int64_t position, std::int64_t channel) const {
    if (position >= span.start) {
      const std::int64_t row = (span.first + position - span.start) * width + channel;
      return {a.values + row, a.logits + row, a.ape + position % a.ratio * width + channel};
    }
    const std::int64_t row = (span.slot * a.ring_size + position % a.ring_size) * width + channel;
    return {a.ring_values + row, a.ring_logits + row, nullptr};
  }

  // Slots are read in the order of their tokens.
  void pool(const Span& span, std::int64_t block, std::int64_t place, Slot* slots) const {
    std::int64_t count = 0;
    if (a.overlap && block > 0)
      for (std::int64_t p = (block - 1) * a.ratio; p < block * a.ratio; ++p)
        if (p >= span.since || p >= span.start) slots[count++] = slot_of(span, p, 0);
    for (std::int64_t p = block * a.ratio; p < (block + 1) * a.ratio; ++p)
      if (p >= span.since || p >= span.start) slots[count++] = slot_of(span, p, a.overlap ? a.dim : 0);
    float* out = a.out + place * a.dim;
    Lanes squares = zeros();
    for (std::int64_t c = 0; c < a.dim; c += lanes) {
      const int here = a.dim - c < lanes ? static_cast<int>(a.dim - c) : lanes;
      Lanes most = logit(slots[0], c, here);
      for (std::int64_t s = 1; s < count; ++s) most = larger(most, logit(slots[s], c, here));
      Lanes total = zeros(), sums = zeros();
      for (std::int64_t s = 0; s < count; ++s) {
        const Lanes weight = exp_falling(sub(logit(slots[s], c, here), most));
        total = add(total, weight);
        sums = fma(weight, some(slots[s].values + c, here), sums);
      }
      const Lanes pooled = div(sums, total);
      squares = fma(pooled, pooled, squares);
      if (here == lanes) store(out + c, pooled);
      else store_some(out + c, pooled, here);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.dim) + a.eps);
    for (std::int64_t c = 0; c < a.dim; ++c) out[c] = out[c] * factor * a.norm[c];
    turn_pairs<false>(out + a.dim - a.rotated, a.turn + place * a.rotated, a.rotated / 2);
  }

  void write_ring(const Span& span) const {
    for (std::int64_t i = span.length > a.ring_size ? span.length - a.ring_size : 0; i < span.length; ++i) {
      const std::int64_t p = span.start + i;
      const Slot slot = slot_of(span, p, 0);
      const std::int64_t row = (span.slot * a.ring_size + p % a.ring_size) * width;
      std::memcpy(a.ring_values + row, slot.values, static_cast<std::size_t>(width) * sizeof(float));
      for (std::int64_t c = 0; c < width; ++c) a.ring_logits[row + c] = slot.logits[c] + slot.bias[c];
    }
  }
};

}  // namespace

void compress(const CompressArgs& a) {
  const Step step(a);
  std::int64_t place = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    const Span& span = a.spans[g];
    const std::int64_t first = span.start / a.ratio, count = (span.start + span.length) / a.ratio - first;
    const std::int64_t slots = a.ratio * (a.overlap ? 2 : 1);
    if (count > 0) {
      parallel(
          count,
          [&](std::int64_t i) {
            Buffer<Slot> space(slots);
            step.pool(span, first + i, place + i, &space[0]);
            if (a.entries != nullptr && (first + i + 1) * a.ratio > span.known)
              std::memcpy(a.entries + row_of_block(a.pages, g, first + i) * a.dim, a.out + (place + i) * a.dim,
                          static_cast<std::size_t>(a.dim) * sizeof(float));
          },
          count * slots * a.dim < small_work ? 1 : 0);
      place += count;
    }
    step.write_ring(span);
  }
}

}  // namespace abyssal::ABYSSAL_ISA
