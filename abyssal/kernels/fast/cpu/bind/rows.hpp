// Arrays of the cache and page tables as arguments.
#pragma once

#include "bind/bind.hpp"
#include "ops/rows.hpp"

namespace abyssal {

// Rows of `dim` values: float32, bfloat16, or packed bytes.
inline Rows rows_of(const char* name, const Array& array, Stored packed, std::int64_t dim, std::int64_t rotated) {
  Rows rows{Stored::float32, static_cast<const std::uint8_t*>(array.data), 4 * dim, dim, rotated};
  if (array.type == Type::uint8) {
    rows.stored = packed;
    const std::int64_t plain = dim - rotated;
    rows.bytes = packed == Stored::key ? dim / 2 + (dim + 31) / 32
                                       : (plain + 2 * rotated + (plain + 63) / 64 + 7) / 8 * 8;
    if (rotated < 0 || rotated > dim || (packed == Stored::key && dim % 2 != 0))
      throw nb::value_error("sizes of a packed row that cannot be");
    array.check(name, Type::uint8, {-1, rows.bytes});
  } else if (array.type == Type::bfloat16) {
    rows.stored = Stored::bfloat16;
    rows.bytes = 2 * dim;
    array.check(name, Type::bfloat16, {-1, dim});
  } else {
    array.check(name, Type::float32, {-1, dim});
  }
  return rows;
}

inline Pages pages_of(const Array& tables, std::int64_t sequences, std::int64_t per_page) {
  const auto* data = tables.as<std::int64_t>("tables", {sequences, -1});
  if (per_page < 1) throw nb::value_error("per_page must be positive");
  return {per_page, tables.shape[1], data};
}

}  // namespace abyssal
