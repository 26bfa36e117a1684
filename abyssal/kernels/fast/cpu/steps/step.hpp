// A step is a sublayer in one call: a list of kernels with memory between them. Compiled once; it calls the kernels of
// the variant in use, and so gives the bits that they give one by one.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "kernels.hpp"
#include "ops/linear.hpp"
#include "ops/rounding.hpp"
#include "ops/streams.hpp"

namespace abyssal {

// Values between two kernels; not set.
class Values {
 public:
  explicit Values(std::int64_t count)
      : data_(static_cast<float*>(::operator new(static_cast<std::size_t>(count) * sizeof(float), line))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t line{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, line); }
  };
  std::unique_ptr<float, Free> data_;
};

// What a product multiplies: one or several matrices, packed or as they lie in a release.
struct Factor {
  Weight weight;
  bool stored;
  std::int64_t matrices;

  // Rows [rows, inputs] times its transpose; with `columns`, each matrix has columns of its own.
  void multiply(const Kernels& kernels, const float* x, std::int64_t rows, float* y, bool columns = false) const {
    const std::int64_t parts = columns ? matrices : 1;
    kernels.linear({weight, stored, matrices, nullptr, columns, rows, false, x, y, parts * weight.inputs,
                    parts * weight.outputs});
  }
};

// Rows as an FP8 product takes them: rounded, a scale for `block` values, or as they are if that is 0.
class Rounded {
 public:
  Rounded(const Kernels& kernels, const float* x, std::int64_t rows, std::int64_t width, std::int64_t block)
      : own_(block > 0 ? rows * width : 0), x_(block > 0 ? own_.get() : x) {
    if (block > 0) kernels.rounding({Rounding::float8, rows, width, block, x, own_.get()});
  }
  const float* get() const { return x_; }

 private:
  Values own_;
  const float* x_;
};

// A sublayer's input, and what is needed to add its output; of the site, tokens and streams are those of the pass.
struct Entered {
  Values x, post, mix;

  Entered(const Kernels& kernels, const Site& s, const float* streams, std::int64_t tokens)
      : x(tokens * s.width), post(tokens * s.streams), mix(tokens * s.streams * s.streams) {
    EnterArgs args{s, x.get(), post.get(), mix.get()};
    args.tokens = tokens;
    args.x = streams;
    kernels.enter(args);
  }
  void leave(const Kernels& kernels, const Site& s, const float* y, const float* streams, std::int64_t tokens,
             float* out) const {
    kernels.leave({tokens, s.streams, s.width, y, streams, post.get(), mix.get(), out});
  }
};

}  // namespace abyssal
