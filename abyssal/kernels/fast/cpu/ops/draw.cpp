#include "ops/draw.hpp"

#include "parallel.hpp"
#include "vec/buffer.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t task_tokens = 1 << 14;
constexpr double ln2 = 0.693147180559945309;

// NumPy's Philox(key, counter=[0, 0, place, 0]): words 4 b to 4 b + 3 of its stream (Salmon et al. 2011).
void philox(const DrawArgs& a, std::uint64_t block, std::uint64_t* words) {
  constexpr std::uint64_t m0 = 0xD2E7470EE14C6C93u, m1 = 0xCA5A826395121157u;
  std::uint64_t c0 = block + 1, c1 = 0, c2 = a.place, c3 = 0, k0 = a.key[0], k1 = a.key[1];
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 p0 = static_cast<unsigned __int128>(m0) * c0, p1 = static_cast<unsigned __int128>(m1) * c2;
    c0 = static_cast<std::uint64_t>(p1 >> 64) ^ c1 ^ k0;
    c2 = static_cast<std::uint64_t>(p0 >> 64) ^ c3 ^ k1;
    c1 = static_cast<std::uint64_t>(p1);
    c3 = static_cast<std::uint64_t>(p0);
    k0 += 0x9E3779B97F4A7C15u;
    k1 += 0xBB67AE8584CAA73Bu;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// As numpy.random.Generator.gumbel computes it, by the C library; `bits` is the uniform number times 2^53.
double score(double logit, std::uint64_t bits) {
  const double uniform = 1.0 - static_cast<double>(bits) * 0x1p-53;
  return logit - __builtin_log(-__builtin_log(uniform));
}

struct Best {
  double score;
  std::int64_t token;
  bool again;  // a number that NumPy draws twice

  void take(double other, std::int64_t at) {
    if (other > score || (other == score && at < token)) score = other, token = at;
  }
};

}  // namespace

void draw(const DrawArgs& a) {
  *a.token = -1;
  if (a.count == 0) return;
  const auto id = [&](std::int64_t i) { return a.ids == nullptr ? i : a.ids[i]; };
  std::int64_t likeliest = id(0);
  for (std::int64_t i = 1; i < a.count; ++i)
    if (a.logits[id(i)] > a.logits[likeliest]) likeliest = id(i);
  if (!(a.logits[likeliest] - a.logits[likeliest] == 0.0)) return;
  std::uint64_t first[4];
  philox(a, static_cast<std::uint64_t>(likeliest / 4), first);
  const std::uint64_t drawn = first[likeliest % 4] >> 11;
  if (drawn == 0) return;
  const Best start{score(a.logits[likeliest], drawn), likeliest, false};
  const std::int64_t tasks = (a.count + task_tokens - 1) / task_tokens;
  Buffer<Best> found(tasks);
  parallel(tasks, [&](std::int64_t task) {
    Best best = start;
    std::uint64_t words[4];
    std::int64_t block = -1;
    const std::int64_t stop = (task + 1) * task_tokens < a.count ? (task + 1) * task_tokens : a.count;
    for (std::int64_t i = task * task_tokens; i < stop; ++i) {
      const std::int64_t token = id(i);
      if (token / 4 != block) philox(a, static_cast<std::uint64_t>(block = token / 4), words);
      const std::uint64_t bits = words[token % 4] >> 11;
      if (bits == 0) {
        best.again = true;
        break;
      }
      // -log(-log(1 - u)) <= -log(u) <= ln 2 times the zeros before u's first digit, and one
      const double most = a.logits[token] + ln2 * static_cast<double>(__builtin_clzll(bits) - 10);
      if (most + 1e-9 >= best.score) best.take(score(a.logits[token], bits), token);
    }
    found[task] = best;
  });
  Best best = start;
  for (std::int64_t t = 0; t < tasks; ++t) {
    if (found[t].again) return;
    best.take(found[t].score, found[t].token);
  }
  *a.token = best.token;
}

}  // namespace abyssal::ABYSSAL_ISA
