#include "isa.hpp"

#include <atomic>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace abyssal {

#ifdef ABYSSAL_HAS_scalar
namespace scalar { extern const Kernels table; }
#endif
#ifdef ABYSSAL_HAS_avx2
namespace avx2 { extern const Kernels table; }
#endif
#ifdef ABYSSAL_HAS_avx512
namespace avx512 { extern const Kernels table; }
#endif
#ifdef ABYSSAL_HAS_neon
namespace neon { extern const Kernels table; }
#endif

namespace {

#if defined(__x86_64__)
// the compiler's own check asks the operating system too, whether it saves the registers
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  __builtin_cpu_init();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_neon() { return (getauxval(AT_HWCAP) & (1UL << 20)) != 0; }  // HWCAP_ASIMDDP
#else
[[maybe_unused]] bool has_neon() { return true; }  // Apple's processors all have it
#endif

const Isa list[] = {
#ifdef ABYSSAL_HAS_avx512
    {"avx512", &avx512::table, has_avx512()},
#endif
#ifdef ABYSSAL_HAS_avx2
    {"avx2", &avx2::table, has_avx2()},
#endif
#ifdef ABYSSAL_HAS_neon
    {"neon", &neon::table, has_neon()},
#endif
    {"scalar", &scalar::table, true},
};
constexpr int count_of_list = sizeof list / sizeof list[0];

const Kernels* best() {
  for (const Isa& isa : list)
    if (isa.supported) return isa.kernels;
  return &scalar::table;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Isa* isas(int& count) {
  count = count_of_list;
  return list;
}

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_relaxed);
  if (now == nullptr) {
    now = best();
    chosen.store(now, std::memory_order_relaxed);
  }
  return *now;
}

bool use(const char* name) {
  for (const Isa& isa : list)
    if (isa.supported && std::strcmp(isa.name, name) == 0) {
      chosen.store(isa.kernels, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace abyssal
