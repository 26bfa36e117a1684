// The three weights of experts as arguments.
#pragma once

#include "bind/weight.hpp"
#include "ops/experts.hpp"

namespace abyssal {

inline ExpertWeights expert_weights(const PackedWeight& w1, const PackedWeight& w3, const PackedWeight& w2) {
  const bool fits = w1.matrices == w3.matrices && w1.matrices == w2.matrices &&
                    w1.weight.outputs == w3.weight.outputs && w1.weight.inputs == w3.weight.inputs &&
                    w2.weight.outputs == w1.weight.inputs && w2.weight.inputs == w1.weight.outputs;
  if (!fits) throw nb::value_error("w1, w3 and w2 do not fit together");
  return {w1.weight, w3.weight, w2.weight, {w1.stored, w3.stored, w2.stored}, w1.matrices};
}

// w1, w3 and w2 of the shared expert, or None.
inline ExpertWeights shared_weights(const nb::object& three, const ExpertWeights& routed) {
  if (three.is_none()) return {};
  const auto parts = nb::cast<nb::tuple>(three);
  if (parts.size() != 3) throw nb::value_error("shared must be w1, w3 and w2");
  const auto found = expert_weights(nb::cast<const PackedWeight&>(parts[0]), nb::cast<const PackedWeight&>(parts[1]),
                                    nb::cast<const PackedWeight&>(parts[2]));
  if (found.matrices != 1 || found.w1.inputs != routed.w1.inputs)
    throw nb::value_error("the shared expert is one, and as wide as the routed ones");
  return found;
}

}  // namespace abyssal
