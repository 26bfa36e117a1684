// The attention sublayer (abyssal/model/attention.py says what it computes).
#pragma once

#include "ops/attend.hpp"
#include "steps/step.hpp"

namespace abyssal {

struct CompressorWeights {
  Factor wkv, wgate;
  const float* ape;   // [ratio, width]
  const float* norm;  // [dim]
  std::int64_t ratio, dim;
  bool overlap;  // width is 2 * dim

  std::int64_t width() const { return overlap ? 2 * dim : dim; }
};

struct IndexWeights {
  Factor wq_b, weights_proj;
  CompressorWeights keys;
  float factor;  // of the heads' weights
  bool exact;    // neither Hadamard nor FP4
};

struct AttentionWeights {
  Site site;
  Factor wq_a, wq_b, wkv, wo_a, wo_b;
  const float *q_norm, *kv_norm, *sink;
  std::int64_t heads, dim, rotated, window;
  float softmax_scale;
  std::int64_t block;  // of the rounding before FP8 products, 0 for none
  bool exact;          // entries are kept as computed
  const CompressorWeights* compressor;  // null: the window alone
  const IndexWeights* index;            // null: every block is read
};

// What a compressor remembers.
struct CompressedCache {
  float *values, *logits;  // rings
  std::int64_t ring_size;
  Rows entries;
  Pages pages;
};

// One pass.
struct AttentionPass {
  std::int64_t tokens, sequences;
  const float* streams;  // [tokens, streams, width]
  const float* turn;     // [tokens, rotated / 2, 2]
  const Span* spans;
  Rows ring;  // of the window
  std::int64_t ring_size;
  CompressedCache compressed, index;
  std::int64_t blocks;         // that the tokens complete
  const float* block_turn;     // [blocks, rotated / 2, 2]
  const std::int64_t* firsts;  // as in IndexTopkArgs
  const std::int64_t* visible;
  std::int64_t k;
  std::int64_t* chosen;  // [tokens, k], receives the indexer's choice; null: every block that a token sees is read
  float* out;            // [tokens, streams, width]
};

void attention_step(const Kernels& kernels, const AttentionWeights& weights, const AttentionPass& pass);

}  // namespace abyssal
