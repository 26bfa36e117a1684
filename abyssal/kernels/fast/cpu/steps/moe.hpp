// The MoE sublayer (abyssal/model/moe.py says what it computes).
#pragma once

#include "ops/experts.hpp"
#include "steps/step.hpp"

namespace abyssal {

struct MoeWeights {
  Site site;
  Factor gate;
  const float* bias;          // [experts], or null
  const std::int64_t* table;  // [vocabulary, k]: experts of each token id; or null
  std::int64_t k;
  float scale;  // what a token's weights sum to
  ExpertWeights routed, shared;
  float limit;
  std::int64_t block;  // of the rounding before products, 0 for none
};

// streams [tokens, streams, width] to out; ids are read where there is a table.
void moe_step(const Kernels& kernels, const MoeWeights& weights, std::int64_t tokens, const float* streams,
              const std::int64_t* ids, float* out);

}  // namespace abyssal
