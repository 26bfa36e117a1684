// A packed weight as Python holds it.
#pragma once

#include "bind/bind.hpp"
#include "steps/step.hpp"

namespace abyssal {

// The arrays belong to tensors that `data` and `scales` keep alive.
struct PackedWeight : Factor {
  nb::object data, scales;
};

}  // namespace abyssal
