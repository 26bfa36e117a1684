// A loop over tasks, for kernels; in the variant's namespace, as all of their inline functions.
#pragma once

#include <cstdint>

#include "pool.hpp"

namespace abyssal::ABYSSAL_ISA {

// Call body(i) for every i below `tasks`; on this thread alone if there is just one.
template <class Body>
inline void parallel(std::int64_t tasks, const Body& body, int most = 0) {
  if (tasks == 1) {
    body(std::int64_t{0});
    return;
  }
  run(
      tasks, [](void* context, std::int64_t i) { (*static_cast<const Body*>(context))(i); },
      const_cast<Body*>(&body), most);
}

}  // namespace abyssal::ABYSSAL_ISA
