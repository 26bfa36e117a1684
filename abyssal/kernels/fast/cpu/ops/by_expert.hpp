// Pairs of a token and one of its experts, sorted by expert, and loops over rows.
#pragma once

#include <cstdint>

#include "parallel.hpp"
#include "vec/buffer.hpp"

namespace abyssal::ABYSSAL_ISA {

constexpr std::int64_t task_values = 1 << 13;  // of one task: less is done before another thread has woken

// Call body(row) for every row; neighbouring rows share a task.
template <class Body>
void each_row(std::int64_t rows, std::int64_t width, const Body& body) {
  const std::int64_t step = width >= task_values ? 1 : task_values / (width < 1 ? 1 : width);
  parallel((rows + step - 1) / step, [&](std::int64_t task) {
    const std::int64_t stop = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (std::int64_t row = task * step; row < stop; ++row) body(row);
  });
}

// Rows sorted by expert; of one expert, by token.
struct ByExpert {
  Buffer<std::int64_t> firsts;  // [experts + 1]: rows of expert e are firsts[e] to firsts[e + 1]
  Buffer<std::int64_t> pair;    // [rows]: token * k + place among the token's experts
  Buffer<std::int64_t> place;   // [tokens, k]: rows of a token, rising by expert

  ByExpert(const std::int64_t* chosen, std::int64_t tokens, std::int64_t k, std::int64_t experts)
      : firsts(experts + 1), pair(tokens * k), place(tokens * k) {
    Buffer<std::int64_t> next(experts + 1), held(tokens);
    for (std::int64_t e = 0; e <= experts; ++e) firsts[e] = 0;
    for (std::int64_t p = 0; p < tokens * k; ++p) ++firsts[chosen[p] + 1];
    for (std::int64_t e = 0; e < experts; ++e) firsts[e + 1] += firsts[e];
    for (std::int64_t e = 0; e <= experts; ++e) next[e] = firsts[e];
    for (std::int64_t p = 0; p < tokens * k; ++p) pair[next[chosen[p]]++] = p;
    for (std::int64_t t = 0; t < tokens; ++t) held[t] = 0;
    for (std::int64_t r = 0; r < tokens * k; ++r) {
      const std::int64_t token = pair[r] / k;
      place[token * k + held[token]++] = r;
    }
  }
  std::int64_t rows() const { return pair.size(); }
};

}  // namespace abyssal::ABYSSAL_ISA
