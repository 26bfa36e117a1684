// A program that compares every instruction set with the scalar one, without Python: for sanitizers and emulators.
//
// `check_NAME` of each kernel stands in check/NAME.cpp; a kernel without one does not link.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels.hpp"

namespace abyssal {

#define ABYSSAL_OP(name, Args) void check_##name(const Kernels& kernels);
#include "ops.inc"
#undef ABYSSAL_OP

// Count a failure and print where.
void expect(bool holds, const char* what, const char* file, int line);
#define ABYSSAL_EXPECT(condition) ::abyssal::expect((condition), #condition, __FILE__, __LINE__)

// The plain variant.
const Kernels& plain();

inline std::mt19937_64& chance() {
  static std::mt19937_64 generator(1);
  return generator;
}
inline std::int64_t random_below(std::int64_t limit) {
  return static_cast<std::int64_t>(chance()() % static_cast<std::uint64_t>(limit));
}
std::vector<float> normal(std::int64_t count);

}  // namespace abyssal
