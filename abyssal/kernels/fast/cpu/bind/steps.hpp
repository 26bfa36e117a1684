#pragma once

#include <nanobind/nanobind.h>

namespace abyssal {

void bind_steps(nanobind::module_& m);

}  // namespace abyssal
