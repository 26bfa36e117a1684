#include "ops/linear.hpp"

#include "ops/product.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/flush.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t block_rows = 192;      // rows whose totals are held while the weight goes by
constexpr int chunk_groups = 4;               // groups that are unpacked at once
constexpr std::int64_t small_work = 1 << 17;  // products that are done before another thread has woken

// Rows up to which it pays to unpack values again for every four of them.
template <class F>
constexpr std::int64_t few_rows = F::format == Format::float32 ? 4 : 24;

// Rows of one matrix.
struct Job {
  Weight weight;
  std::int64_t first, rows;
};

struct Output {
  void* y;
  std::int64_t outputs;
  bool bfloat16;

  void put(std::int64_t row, std::int64_t strip, Lanes value) const {
    const std::int64_t at = row * outputs + strip * lanes;
    const int count = static_cast<int>(outputs - strip * lanes < lanes ? outputs - strip * lanes : lanes);
    if (!bfloat16) {
      float* to = static_cast<float*>(y) + at;
      if (count == lanes) store(to, value);
      else store_some(to, value, count);
      return;
    }
    float values[lanes];
    store(values, value);
    auto* to = static_cast<std::uint16_t*>(y) + at;
    for (int i = 0; i < count; ++i) to[i] = to_bfloat16(values[i]);
  }
};

template <class F, int R>
void few_rows_of_strip(const Job& job, std::int64_t strip, const float* x, std::int64_t stride, std::int64_t row,
                       const Output& out) {
  const float* rows[R];
  Lanes totals[R];
  for (int r = 0; r < R; ++r) rows[r] = x + (row + r) * stride;
  few<F, R>(job.weight, strip, rows, totals);
  for (int r = 0; r < R; ++r) out.put(row + r, strip, totals[r]);
}

template <class F>
void few_of_strip(const Job& job, std::int64_t strip, const float* x, std::int64_t stride, const Output& out) {
  std::int64_t row = job.first, left = job.rows;
  for (; left >= 4; left -= 4, row += 4) few_rows_of_strip<F, 4>(job, strip, x, stride, row, out);
  if (left == 1) few_rows_of_strip<F, 1>(job, strip, x, stride, row, out);
  if (left == 2) few_rows_of_strip<F, 2>(job, strip, x, stride, row, out);
  if (left == 3) few_rows_of_strip<F, 3>(job, strip, x, stride, row, out);
}

// Up to tile_strips strips against up to block_rows rows.
template <class F>
struct Many {
  const Weight& w;
  std::int64_t strip;
  const float* x;
  std::int64_t stride, rows;
  alignas(64) float totals[block_rows][tile_strips][lanes];
  alignas(64) float scales[chunk_groups][tile_strips][lanes];
  alignas(64) float values[tile_strips][chunk_groups * group_inputs * lanes];

  // a constructor, so that the arrays are not cleared
  Many(const Weight& weight, std::int64_t first_strip, const float* first_row, std::int64_t row_stride,
       std::int64_t count)
      : w(weight), strip(first_strip), x(first_row), stride(row_stride), rows(count) {}

  template <int R, int S>
  void rows_at(std::int64_t row, std::int64_t group, int count, const float* from, std::int64_t strip_stride) {
    for (int g = 0; g < count; ++g) {
      Lanes sums[R][S];
      tile_group<R, S>(from + g * group_inputs * lanes, strip_stride, x + row * stride + (group + g) * group_inputs,
                       stride, sums);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          float* total = totals[row + r][s];
          if constexpr (scaled<F>) store(total, fold<F>(load(total), sums[r][s], load(scales[g][s])));
          else store(total, add(load(total), sums[r][s]));
        }
    }
  }

  template <int S, int R = tile_rows>
  void rest(std::int64_t row, int left, std::int64_t group, int count, const float* from, std::int64_t step) {
    if constexpr (R > 1) {
      if (left < R) {
        rest<S, R - 1>(row, left, group, count, from, step);
        return;
      }
    }
    rows_at<R, S>(row, group, count, from, step);
  }

  template <int S>
  void run() {
    std::memset(totals, 0, sizeof totals[0] * static_cast<std::size_t>(rows));
    for (std::int64_t group = 0; group < w.groups(); group += chunk_groups) {
      const int count = static_cast<int>(w.groups() - group < chunk_groups ? w.groups() - group : chunk_groups);
      const float* from = values[0];
      std::int64_t step = chunk_groups * group_inputs * lanes;
      if constexpr (F::format == Format::float32) {
        from = reinterpret_cast<const float*>(block_of<F>(w, strip, group));
        step = w.groups() * group_inputs * lanes;
      } else {
        for (int s = 0; s < S; ++s)
          for (int g = 0; g < count; ++g) {
            unpack_block<F>(block_of<F>(w, strip + s, group + g), values[s] + g * group_inputs * lanes);
            if constexpr (scaled<F>) store(scales[g][s], scales_at<F>(w, strip + s, group + g));
          }
      }
      std::int64_t row = 0;
      for (; row + tile_rows <= rows; row += tile_rows) rows_at<tile_rows, S>(row, group, count, from, step);
      if (row < rows) rest<S>(row, static_cast<int>(rows - row), group, count, from, step);
    }
  }

  template <int S = tile_strips>
  void run_strips(int strips) {
    if constexpr (S > 1) {
      if (strips < S) {
        run_strips<S - 1>(strips);
        return;
      }
    }
    run<S>();
  }
};

template <class F>
void many(const Job& job, std::int64_t strip, int strips, const float* x, std::int64_t stride, const Output& out) {
  for (std::int64_t row = 0; row < job.rows; row += block_rows) {
    const std::int64_t rows = job.rows - row < block_rows ? job.rows - row : block_rows;
    Many<F> work{job.weight, strip, x + (job.first + row) * stride, stride, rows};
    work.run_strips(strips);
    for (std::int64_t r = 0; r < rows; ++r)
      for (int s = 0; s < strips; ++s) out.put(job.first + row + r, strip + s, load(work.totals[r][s]));
  }
}

template <class F>
void rows_of_strips(const Job& job, std::int64_t strip, int strips, const float* x, std::int64_t stride,
                    const Output& out) {
  if (job.rows > few_rows<F>) {
    many<F>(job, strip, strips, x, stride, out);
    return;
  }
  for (int s = 0; s < strips; ++s) few_of_strip<F>(job, strip + s, x, stride, out);
}

// The matrices that have rows.
Buffer<Job> jobs_of(const LinearArgs& a, std::int64_t& count) {
  Buffer<Job> jobs(a.matrices);
  count = 0;
  const Weight& w = a.weight;
  for (std::int64_t e = 0; e < a.matrices; ++e) {
    const std::int64_t first = a.firsts == nullptr ? 0 : a.firsts[e];
    const std::int64_t rows = (a.firsts == nullptr ? a.rows : a.firsts[e + 1]) - first;
    if (rows <= 0) continue;
    Weight own = w;
    own.data += e * w.strips() * w.groups() * block_bytes(w.format);
    if (w.scales != nullptr) own.scales += e * w.strips() * w.groups() * lanes;
    if (w.tile_scales != nullptr) own.tile_scales += e * ((w.outputs + tile_side - 1) / tile_side) * w.tiles_across();
    jobs[count++] = {own, first, rows};
  }
  return jobs;
}

// Rows as float32, filled with zeros to whole groups; empty if they may be read where they lie.
Buffer<float> widened(const LinearArgs& a, std::int64_t stride) {
  if (!a.bfloat16 && stride == a.weight.inputs) return Buffer<float>(0);
  Buffer<float> wide(a.rows * stride);
  for (std::int64_t r = 0; r < a.rows; ++r) {
    float* to = &wide[r * stride];
    if (a.bfloat16) {
      const auto* from = static_cast<const std::uint16_t*>(a.x) + r * a.weight.inputs;
      for (std::int64_t i = 0; i < a.weight.inputs; ++i) to[i] = from_bfloat16(from[i]);
    } else {
      std::memcpy(to, static_cast<const float*>(a.x) + r * a.weight.inputs,
                  static_cast<std::size_t>(a.weight.inputs) * sizeof(float));
    }
    for (std::int64_t i = a.weight.inputs; i < stride; ++i) to[i] = 0.0f;
  }
  return wide;
}

}  // namespace

void linear(const LinearArgs& a) {
  const Weight& w = a.weight;
  if (a.rows == 0 || w.outputs == 0) return;
  const std::int64_t stride = w.groups() * group_inputs, strips = w.strips();
  const Output out{a.y, w.outputs, a.bfloat16};
  std::int64_t count = 0;
  const Buffer<Job> jobs = jobs_of(a, count);
  const bool one_thread = a.rows * w.outputs * w.inputs <= small_work;
  const std::int64_t sets = (strips + tile_strips - 1) / tile_strips;
  const Buffer<float> wide = widened(a, stride);
  const float* x = wide.size() > 0 ? &wide[0] : static_cast<const float*>(a.x);
  parallel(
      count * sets,
      [&](std::int64_t task) {
        const Flush flush(a.bfloat16);
        const Job& job = jobs[task / sets];
        const std::int64_t strip = task % sets * tile_strips;
        const int here = static_cast<int>(strips - strip < tile_strips ? strips - strip : tile_strips);
        switch (w.format) {
          case Format::float32: rows_of_strips<Float32>(job, strip, here, x, stride, out); break;
          case Format::bfloat16: rows_of_strips<Bfloat16>(job, strip, here, x, stride, out); break;
          case Format::float8: rows_of_strips<Float8>(job, strip, here, x, stride, out); break;
          case Format::float4: rows_of_strips<Float4>(job, strip, here, x, stride, out); break;
        }
      },
      one_thread ? 1 : 0);
}

}  // namespace abyssal::ABYSSAL_ISA
