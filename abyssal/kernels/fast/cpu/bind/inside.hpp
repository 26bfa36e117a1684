// Whether everything that a kernel reads or writes lies inside the arrays.
#pragma once

#include "bind/rows.hpp"
#include "ops/attend.hpp"
#include "ops/compress.hpp"
#include "ops/index_topk.hpp"

namespace abyssal {

static_assert(sizeof(Span) == 6 * sizeof(std::int64_t));

inline bool inside(const AttendArgs& a, std::int64_t tokens, std::int64_t ring_rows, std::int64_t entry_rows) {
  if (a.window < 1 || a.ring_size < a.window) return false;
  std::int64_t before = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    const Span& s = a.spans[g];
    if (s.first != before || s.length < 0 || s.start < 0 || s.slot < 0 || s.first + s.length > tokens ||
        (s.slot + 1) * a.ring_size > ring_rows)
      return false;
    before = s.first + s.length;
    if (a.ratio > 0 && a.blocks == nullptr && (s.start + s.length) / a.ratio > a.pages.most * a.pages.per_page)
      return false;
  }
  if (a.ratio > 0) {
    for (std::int64_t i = 0; i < a.sequences * a.pages.most; ++i)
      if (a.pages.tables[i] < 0 || (a.pages.tables[i] + 1) * a.pages.per_page >= entry_rows) return false;
    if (a.blocks != nullptr)
      for (std::int64_t i = 0; i < before * a.k; ++i)
        if (a.blocks[i] < -1 || a.blocks[i] >= a.pages.most * a.pages.per_page) return false;
  }
  return true;
}

// entry_rows: -1 if blocks are not stored
inline bool inside(const CompressArgs& a, std::int64_t tokens, std::int64_t ring_rows, std::int64_t entry_rows,
            std::int64_t blocks) {
  if (a.ratio < 1 || a.ring_size < a.ratio * (a.overlap ? 2 : 1)) return false;
  std::int64_t before = 0, count = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    const Span& s = a.spans[g];
    if (s.first != before || s.length < 0 || s.start < 0 || s.slot < 0 || s.first + s.length > tokens ||
        (s.slot + 1) * a.ring_size > ring_rows)
      return false;
    before = s.first + s.length;
    const std::int64_t first = s.start / a.ratio, stop = (s.start + s.length) / a.ratio;
    count += stop - first;
    // a block's own tokens are there
    if (stop > first && first * a.ratio < s.since && s.since < s.start) return false;
    if (entry_rows < 0) continue;
    if (stop > a.pages.most * a.pages.per_page) return false;
    for (std::int64_t b = first; b < stop; ++b) {
      const std::int64_t page = a.pages.tables[g * a.pages.most + b / a.pages.per_page];
      if (page < 0 || (page + 1) * a.pages.per_page >= entry_rows) return false;
    }
  }
  return count == blocks;
}

// queries: as many as there are of q and of `visible`
inline bool inside(const IndexTopkArgs& a, std::int64_t queries) {
  if (a.sequences < 0 || a.firsts[0] != 0 || a.firsts[a.sequences] > queries) return false;
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    if (a.firsts[g] > a.firsts[g + 1]) return false;
    for (std::int64_t t = a.firsts[g]; t < a.firsts[g + 1]; ++t)
      if (a.visible[t] < 0 || a.visible[t] > a.pages.most * a.pages.per_page) return false;
  }
  return true;
}

}  // namespace abyssal
