// A packed weight as Python holds it.
#pragma once

#include "bind/bind.hpp"
#include "ops/weight.hpp"

namespace abyssal {

// One or several matrices of equal shape. The arrays belong to tensors that `data` and `scales` keep alive.
struct PackedWeight {
  Weight weight;
  bool stored;  // not packed: as it lies in a release
  std::int64_t matrices;
  nb::object data, scales;
};

}  // namespace abyssal
