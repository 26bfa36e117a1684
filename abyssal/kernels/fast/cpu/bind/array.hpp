// Arrays of Python as arguments of kernels, without a copy.
//
// torch publishes a C function that describes a tensor in 20 ns, where its `__dlpack__` takes 2 us, as long as a
// small kernel. Other arrays (NumPy's) come through DLPack or the buffer protocol.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace abyssal {

namespace nb = nanobind;

enum class Type { float32, float64, bfloat16, int8, uint8, int32, int64, boolean, float8, complex64, other };

const char* name_of(Type type);
Type type_of(nb::dlpack::dtype dtype);

// A dense array in memory that Python owns; valid until the call returns.
class Array {
 public:
  void* data = nullptr;
  Type type = Type::other;
  int ndim = 0;
  const std::int64_t* shape = nullptr;
  bool dense = false;  // row-major without gaps

  std::int64_t size() const {
    std::int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  // The data, if type and shape are as wanted (-1: any size); else an error that names the argument.
  template <class T>
  T* as(const char* name, std::initializer_list<std::int64_t> wanted) const {
    check(name, type_for<T>(), wanted);
    return static_cast<T*>(data);
  }
  void check(const char* name, Type wanted_type, std::initializer_list<std::int64_t> wanted) const;

  // The data of any shape.
  template <class T>
  T* any(const char* name) const {
    check_type(name, type_for<T>());
    return static_cast<T*>(data);
  }
  // Complex numbers of any shape, at least one dimension: real and imaginary parts in turn.
  const float* complex(const char* name) const;
  void check_type(const char* name, Type wanted_type) const;

 private:
  template <class T>
  static constexpr Type type_for() {
    if constexpr (std::is_same_v<T, float>) return Type::float32;
    else if constexpr (std::is_same_v<T, double>) return Type::float64;
    else if constexpr (std::is_same_v<T, std::uint16_t>) return Type::bfloat16;
    else if constexpr (std::is_same_v<T, std::int8_t>) return Type::int8;
    else if constexpr (std::is_same_v<T, std::uint8_t>) return Type::uint8;
    else if constexpr (std::is_same_v<T, std::int32_t>) return Type::int32;
    else if constexpr (std::is_same_v<T, std::int64_t>) return Type::int64;
    else return Type::boolean;
  }
};

// Describe a torch tensor through its C function. False: this object has none.
bool describe_fast(PyObject* object, Array& out);

}  // namespace abyssal

namespace nanobind::detail {

template <>
struct type_caster<abyssal::Array> {
  NB_TYPE_CASTER(abyssal::Array, const_name("Array"))

  bool from_python(handle source, std::uint32_t flags, cleanup_list* cleanup) noexcept {
    if (source.is_none()) return false;
    if (abyssal::describe_fast(source.ptr(), value)) return true;
    PyErr_Clear();
    make_caster<ndarray<device::cpu>> slow;
    if (!slow.from_python(source, flags, cleanup)) return false;
    held_ = slow.value;
    value.data = held_.data();
    value.ndim = static_cast<int>(held_.ndim());
    value.shape = held_.shape_ptr();
    value.type = abyssal::type_of(held_.dtype());
    value.dense = true;
    std::int64_t step = 1;
    for (int i = value.ndim - 1; i >= 0; --i) {
      if (value.shape[i] != 1 && held_.stride(i) != step) value.dense = false;
      step *= value.shape[i];
    }
    if (step == 0) value.dense = true;
    return true;
  }

 private:
  ndarray<device::cpu> held_;
};

}  // namespace nanobind::detail
