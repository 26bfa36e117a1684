// The best k of a stream of scores.
#pragma once

#include "vec/masks.hpp"

namespace abyssal::ABYSSAL_ISA {

// Scores and blocks as one integer, in the order of the scores and of falling blocks among equal ones, so that the
// best k are the same in whatever order they come (abyssal/kernels/index_topk.py, `_ranks`).
inline std::int64_t rank_of(float score, std::int64_t block) {
  const float x = score + 0.0f;  // minus zero ties with zero
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::int64_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return ordered * (std::int64_t{1} << 32) + (0xffffffff - block);
}

inline float score_of(std::int64_t rank) {
  const auto ordered = static_cast<std::int32_t>(rank >> 32);
  const std::int32_t bits = ordered ^ ((ordered >> 31) & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

inline std::int64_t block_of(std::int64_t rank) { return 0xffffffff - (rank & 0xffffffff); }

// Move the k largest of `count` different integers to the front.
inline void select(std::int64_t* x, std::int64_t count, std::int64_t k) {
  std::int64_t low = 0, high = count - 1;
  while (low < high) {
    const std::int64_t a = x[low], b = x[low + (high - low) / 2], c = x[high];
    const std::int64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
    std::int64_t i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i <= j) {
        const std::int64_t swapped = x[i];
        x[i++] = x[j];
        x[j--] = swapped;
      }
    }
    if (k - 1 <= j) high = j;
    else if (k - 1 >= i) low = i;
    else return;
  }
}

// Sort integers, the smallest first.
inline void sort(std::int64_t* x, std::int64_t count) {
  for (std::int64_t gap = count / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
    for (std::int64_t i = gap; i < count; ++i) {
      const std::int64_t value = x[i];
      std::int64_t j = i;
      for (; j >= gap && x[j - gap] > value; j -= gap) x[j] = x[j - gap];
      x[j] = value;
    }
}

// A stream in rising order of blocks, over memory for `room(k)` integers.
class Top {
 public:
  static std::int64_t room(std::int64_t k) { return 2 * k + 64; }

  Top(std::int64_t* memory, std::int64_t k) : ranks_(memory), k_(k), floor_(__builtin_nanf("")) {}

  // The first `here` lanes are the scores of blocks first, first + 1, ...
  void add(Lanes scores, int here, std::int64_t first) {
    std::uint32_t better = not_below(scores, all(floor_)) & ((1u << here) - 1);
    if (better == 0) return;
    float values[lanes];
    store(values, scores);
    for (; better != 0; better &= better - 1) {
      const int lane = __builtin_ctz(better);
      const std::int64_t rank = rank_of(values[lane], first + lane);
      if (rank > least_) ranks_[count_++] = rank;
    }
    if (count_ >= room(k_) - lanes) shrink();
  }

  // Keep the best; their number.
  std::int64_t shrink() {
    if (count_ > k_) {
      select(ranks_, count_, k_);
      count_ = k_;
    }
    if (count_ == k_) {
      least_ = ranks_[0];
      for (std::int64_t i = 1; i < k_; ++i) least_ = ranks_[i] < least_ ? ranks_[i] : least_;
      floor_ = score_of(least_);
    }
    return count_;
  }

 private:
  std::int64_t* ranks_;
  std::int64_t k_, count_ = 0, least_ = INT64_MIN;
  float floor_;
};

}  // namespace abyssal::ABYSSAL_ISA
