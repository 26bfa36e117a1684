// Where a sublayer meets the residual streams (kernels/streams.py holds the contract, architecture.md 2.3).
//
// enter: project all streams of a token, divided by their root mean square; gates; the streams' weighted sum, and if
// wanted its RMSNorm. leave: mix the streams and add the sublayer's output.
#pragma once

#include <cstdint>

namespace abyssal {

constexpr std::int64_t most_streams = 8;

struct EnterArgs {
  std::int64_t tokens, streams, width;
  const float* x;          // [tokens, streams, width]
  const float* fn;         // [gates, streams * width]: (2 + streams) * streams gates, or `streams` if mix is null
  const float* base;       // [gates]
  const float* scale;      // [3] for pre, post and mix; [1] if mix is null
  const float* norm;       // [width], or null to leave the sum as it is
  float rms_eps, eps;      // of the root mean squares; of the gates
  int iterations;          // column steps
  float* y;                // [tokens, width]
  float* post;             // [tokens, streams]
  float* mix;              // [tokens, streams (in), streams (out)], or null: no gates but pre
};

struct LeaveArgs {
  std::int64_t tokens, streams, width;
  const float* y;     // [tokens, width]
  const float* x;     // [tokens, streams, width]
  const float* post;  // [tokens, streams]
  const float* mix;   // [tokens, streams (in), streams (out)]
  float* out;         // [tokens, streams, width]
};

}  // namespace abyssal
