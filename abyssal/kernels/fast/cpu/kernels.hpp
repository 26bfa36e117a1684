// The table of kernels that each instruction set fills.
#pragma once

namespace abyssal {

#define ABYSSAL_OP(name, Args) struct Args;
#include "ops.inc"
#undef ABYSSAL_OP

struct Kernels {
  const char* isa;
#define ABYSSAL_OP(name, Args) void (*name)(const Args&);
#include "ops.inc"
#undef ABYSSAL_OP
};

}  // namespace abyssal
