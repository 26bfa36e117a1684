// Arguments of `enter` and of its way back.
#pragma once

#include "bind/bind.hpp"
#include "ops/streams.hpp"

namespace abyssal {

inline void set_site(Site& a, const Array& x, const Array& fn, const Array& base, const Array& scale,
                     const nb::object& norm, double rms_eps, double eps, int iterations, bool mixed) {
  a.x = x.as<float>("x", {-1, -1, -1});
  a.tokens = x.shape[0], a.streams = x.shape[1], a.width = x.shape[2];
  if (a.streams < 1 || a.streams > most_streams) throw nb::value_error("1 to 8 streams");
  a.mixed = mixed;
  if (mixed && iterations < 1) throw nb::value_error("iterations must be positive");
  a.fn = fn.as<float>("fn", {a.gates(), a.streams * a.width});
  a.base = base.as<float>("base", {a.gates()});
  a.scale = scale.as<float>("scale", {mixed ? 3 : 1});
  if (!norm.is_none()) a.norm = nb::cast<Array>(norm).as<float>("norm", {a.width});
  a.rms_eps = static_cast<float>(rms_eps);
  a.eps = static_cast<float>(eps);
  a.iterations = iterations;
}

// One array: post of all tokens, then mix of all tokens.
inline float* gates_of(const Site& a, const nb::object& gates, const char* name) {
  return nb::cast<Array>(gates).as<float>(name, {a.tokens * a.streams * (1 + a.streams)});
}

}  // namespace abyssal
