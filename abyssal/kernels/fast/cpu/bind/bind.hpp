// What the bindings share. `bind_NAME` of each kernel in ops.inc stands in bind/NAME.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include "bind/array.hpp"
#include "isa.hpp"

namespace abyssal {

#define ABYSSAL_OP(name, Args) void bind_##name(nb::module_& m);
#include "ops.inc"
#undef ABYSSAL_OP

// Call a kernel of the variant in use while other Python threads go on.
#define ABYSSAL_CALL(name, args)            \
  do {                                      \
    const nb::gil_scoped_release release;   \
    ::abyssal::kernels().name(args);        \
  } while (0)

}  // namespace abyssal
