// Memory of a kernel call.
#pragma once

#include <cstdint>

namespace abyssal::ABYSSAL_ISA {

// `count` values of a plain type, not set, aligned for vectors.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t count) : count_(count) {
    raw_ = count > 0 ? __builtin_malloc(static_cast<std::size_t>(count) * sizeof(T) + 64) : nullptr;
    const auto address = reinterpret_cast<std::uintptr_t>(raw_);
    data_ = reinterpret_cast<T*>((address + 63) & ~std::uintptr_t{63});
  }
  ~Buffer() { __builtin_free(raw_); }
  Buffer(Buffer&& other) noexcept : raw_(other.raw_), data_(other.data_), count_(other.count_) { other.raw_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }
  // null if there are none
  T* data() { return count_ > 0 ? data_ : nullptr; }
  const T* data() const { return count_ > 0 ? data_ : nullptr; }
  std::int64_t size() const { return count_; }

 private:
  void* raw_;
  T* data_;
  std::int64_t count_;
};

}  // namespace abyssal::ABYSSAL_ISA
