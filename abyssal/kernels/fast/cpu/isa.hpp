// Which instruction sets were built and which this processor has.
#pragma once

#include "kernels.hpp"

namespace abyssal {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;  // by this processor and its operating system
};

// The variants of this build, best first; `count` receives their number.
const Isa* isas(int& count);

// The kernels in use; at first the best that the processor has.
const Kernels& kernels();

// Use the variant of this name. False: it was not built, or this processor lacks it.
bool use(const char* name);

}  // namespace abyssal
