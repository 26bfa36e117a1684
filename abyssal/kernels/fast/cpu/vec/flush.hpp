// Subnormal numbers count as zero while such an object lives: the processor's bfloat16 products have it so, and every
// path for bfloat16 gives the same bits.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace abyssal::ABYSSAL_ISA {

class Flush {
 public:
#if defined(__x86_64__)
  explicit Flush(bool wanted) : before_(_mm_getcsr()) {
    if (wanted) _mm_setcsr(before_ | 0x8040);
  }
  ~Flush() { _mm_setcsr(before_); }

 private:
  std::uint32_t before_;
#elif defined(__aarch64__)
  explicit Flush(bool wanted) {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (wanted) asm volatile("msr fpcr, %0" : : "r"(before_ | (1UL << 24)));
  }
  ~Flush() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  std::uint64_t before_;
#else
  explicit Flush(bool) {}
  ~Flush() {}
#endif
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;
};

}  // namespace abyssal::ABYSSAL_ISA
