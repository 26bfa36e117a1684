// The indexer's scores and its choice (abyssal/kernels/index_topk.py).
#pragma once

#include "ops/rows.hpp"

namespace abyssal {

struct IndexTopkArgs {
  std::int64_t sequences;
  const std::int64_t* firsts;   // [sequences + 1]: queries firsts[g] to firsts[g + 1] are those of sequence g
  std::int64_t heads, k;
  const float* q;               // [queries, heads, dim]
  const float* weights;         // [queries, heads]
  const std::int64_t* visible;  // [queries] blocks that a query may see
  Rows keys;                    // float32 or key
  Pages pages;
  std::int64_t* blocks;         // [queries, k] in rising order, -1 in unused places
};

}  // namespace abyssal
