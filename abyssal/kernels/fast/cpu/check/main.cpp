#include <cstdio>
#include <cstring>

#include "check/check.hpp"
#include "isa.hpp"
#include "pool.hpp"

namespace abyssal {

namespace {
int failures = 0;
}

void expect(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("%s:%d: not so: %s\n", file, line, what);
}

const Kernels& plain() {
  int count = 0;
  const Isa* list = isas(count);
  return *list[count - 1].kernels;
}

std::vector<float> normal(std::int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = distribution(chance());
  return values;
}

}  // namespace abyssal

int main() {
  using namespace abyssal;
  int count = 0;
  const Isa* list = isas(count);
  for (int i = 0; i < count; ++i) {
    if (!list[i].supported) {
      std::printf("%-7s not on this processor\n", list[i].name);
      continue;
    }
    const int before = failures;
    for (int members = 1; members <= 4; members += 3) {
      set_threads(members);
#define ABYSSAL_OP(name, Args)                    \
  chance().seed(1);                               \
  check_##name(*list[i].kernels);
#include "ops.inc"
#undef ABYSSAL_OP
    }
    std::printf("%-7s %s\n", list[i].name, failures == before ? "ok" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}
