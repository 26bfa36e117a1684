// The extension module abyssal.kernels.fast._cpu.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "bind/bind.hpp"
#include "bind/steps.hpp"
#include "pool.hpp"

NB_MODULE(_cpu, m) {
  using namespace abyssal;
  nb::set_leak_warnings(false);  // models live until the process ends
  m.def("isas", [] {
    int count = 0;
    const Isa* list = isas(count);
    std::vector<std::tuple<std::string, bool>> found;
    for (int i = 0; i < count; ++i) found.emplace_back(list[i].name, list[i].supported);
    return found;
  });
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("use", [](const std::string& name) { return use(name.c_str()); });
  m.def("threads", &threads);
  m.def("set_threads", &set_threads);
#define ABYSSAL_OP(name, Args) bind_##name(m);
#include "ops.inc"
#undef ABYSSAL_OP
  bind_steps(m);
}
