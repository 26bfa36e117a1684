// Where a sublayer meets the residual streams (kernels/streams.py holds the contract, architecture.md 2.3).
//
// enter: project all streams of a token, divided by their root mean square; gates; the streams' weighted sum, and if
// wanted its RMSNorm. leave: mix the streams and add the sublayer's output. Gradients are named d and what they are of.
#pragma once

#include <cstdint>

namespace abyssal {

constexpr std::int64_t most_streams = 8;

// What is projected, and how.
struct Site {
  std::int64_t tokens, streams, width;
  const float* x;      // [tokens, streams, width]
  const float* fn;     // [gates, streams * width]
  const float* base;   // [gates]
  const float* scale;  // [3] for pre, post and mix; [1] unless mixed
  const float* norm;   // [width], or null to leave the sum as it is
  float rms_eps, eps;  // of the root mean squares; of the gates
  int iterations;      // column steps
  bool mixed;          // false: no gates but pre

  std::int64_t gates() const { return mixed ? (2 + streams) * streams : streams; }
};

struct EnterArgs : Site {
  float* y;     // [tokens, width]
  float* post;  // [tokens, streams]
  float* mix;   // [tokens, streams (in), streams (out)]
};

// Gradients of all that enters, from those of what comes out.
struct EnterBackwardArgs : Site {
  const float* dy;    // [tokens, width]
  const float* dpost;  // as post and mix; null unless mixed
  const float* dmix;
  float* dx;
  float* dfn;
  float* dbase;
  float* dscale;
  float* dnorm;  // null without a norm
};

struct LeaveArgs {
  std::int64_t tokens, streams, width;
  const float* y;     // [tokens, width]
  const float* x;     // [tokens, streams, width]
  const float* post;  // [tokens, streams]
  const float* mix;   // [tokens, streams (in), streams (out)]
  float* out;         // [tokens, streams, width]
};

struct LeaveBackwardArgs {
  std::int64_t tokens, streams, width;
  const float* y;
  const float* x;
  const float* post;
  const float* mix;
  const float* dout;  // [tokens, streams, width]
  float* dy;
  float* dx;
  float* dpost;
  float* dmix;
};

}  // namespace abyssal
