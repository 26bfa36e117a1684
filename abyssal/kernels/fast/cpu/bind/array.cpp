#include "bind/array.hpp"

#include <stdexcept>

namespace abyssal {

namespace {

// The part of dlpack.h (1.2 and newer) that we need.
struct Tensor {
  void* data;
  nb::dlpack::device device;
  std::int32_t ndim;
  nb::dlpack::dtype dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct Exchange {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* stream;
};

// The exchange functions of a type, found once; null if it has none. Called with the GIL held.
const Exchange* exchange_of(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const Exchange* exchange;
  };
  static Entry known[4];
  static int count = 0;
  for (int i = 0; i < count; ++i)
    if (known[i].type == type) return known[i].exchange;
  const Exchange* found = nullptr;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    found = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (found != nullptr && (found->version.major != 1 || found->tensor_from_object == nullptr)) found = nullptr;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (found != nullptr && count < 4) {
    Py_INCREF(type);  // so that no other type takes its address
    known[count++] = {type, found};
  }
  return found;
}

}  // namespace

const char* name_of(Type type) {
  switch (type) {
    case Type::float32: return "float32";
    case Type::float64: return "float64";
    case Type::bfloat16: return "bfloat16";
    case Type::int8: return "int8";
    case Type::uint8: return "uint8";
    case Type::int32: return "int32";
    case Type::int64: return "int64";
    case Type::boolean: return "bool";
    case Type::float8: return "float8";
    case Type::complex64: return "complex64";
    default: return "another type";
  }
}

Type type_of(nb::dlpack::dtype dtype) {
  using nb::dlpack::dtype_code;
  const auto code = static_cast<dtype_code>(dtype.code);
  const int bits = dtype.bits;
  if (dtype.lanes != 1) return Type::other;
  if (code == dtype_code::Float && bits == 32) return Type::float32;
  if (code == dtype_code::Float && bits == 64) return Type::float64;
  if (code == dtype_code::Bfloat && bits == 16) return Type::bfloat16;
  if (code == dtype_code::Int && bits == 8) return Type::int8;
  if (code == dtype_code::UInt && bits == 8) return Type::uint8;
  if (code == dtype_code::Int && bits == 32) return Type::int32;
  if (code == dtype_code::Int && bits == 64) return Type::int64;
  if (code == dtype_code::Bool) return Type::boolean;
  if (code == dtype_code::Complex && bits == 64) return Type::complex64;
  if (bits == 8 && dtype.code >= 7 && dtype.code <= 14) return Type::float8;
  return Type::other;
}

bool describe_fast(PyObject* object, Array& out) {
  const Exchange* exchange = exchange_of(Py_TYPE(object));
  Tensor tensor;
  if (exchange == nullptr || exchange->tensor_from_object(object, &tensor) != 0) return false;
  if (tensor.device.device_type != nb::device::cpu::value) return false;
  out.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  out.ndim = tensor.ndim;
  out.shape = tensor.shape;
  out.type = type_of(tensor.dtype);
  out.dense = true;
  std::int64_t step = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.strides != nullptr && tensor.shape[i] != 1 && tensor.strides[i] != step) out.dense = false;
    step *= tensor.shape[i];
  }
  if (step == 0) out.dense = true;
  return true;
}

void Array::check_type(const char* name, Type wanted_type) const {
  if (type == wanted_type && dense) return;
  const std::string message = std::string(name) + " is " + name_of(type) + (dense ? "" : " with gaps") +
                              ": need dense " + name_of(wanted_type);
  throw nb::value_error(message.c_str());
}

const float* Array::complex(const char* name) const {
  check_type(name, Type::complex64);
  if (ndim < 1) throw nb::value_error((std::string(name) + " needs a dimension").c_str());
  return static_cast<const float*>(data);
}

void Array::check(const char* name, Type wanted_type, std::initializer_list<std::int64_t> wanted) const {
  bool fits = static_cast<int>(wanted.size()) == ndim;
  int axis = 0;
  for (const std::int64_t size : wanted) {
    if (!fits) break;
    fits = size < 0 || shape[axis] == size;
    ++axis;
  }
  if (fits && type == wanted_type && dense) return;
  const auto list = [](const std::int64_t* sizes, std::size_t count) {
    std::string text = "[";
    for (std::size_t i = 0; i < count; ++i) {
      if (i) text += ", ";
      text += sizes[i] < 0 ? "any" : std::to_string(sizes[i]);
    }
    return text + "]";
  };
  std::string message = std::string(name) + " is " + name_of(type) + " " + list(shape, static_cast<std::size_t>(ndim));
  if (!dense) message += " with gaps";
  message += std::string(": need dense ") + name_of(wanted_type) + " " + list(wanted.begin(), wanted.size());
  throw nb::value_error(message.c_str());
}

}  // namespace abyssal
