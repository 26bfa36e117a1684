#include "ops/linear.hpp"

#include "ops/many.hpp"
#include "ops/packing.hpp"
#include "ops/product.hpp"
#include "parallel.hpp"
#include "vec/buffer.hpp"
#include "vec/flush.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

constexpr std::int64_t small_work = 1 << 17;  // products that are done before another thread has woken

// Rows up to which it pays to unpack values again for every four of them.
template <class F>
constexpr std::int64_t few_rows = F::format == Format::float32 ? 4 : 24;
constexpr std::int64_t few_narrow_rows = 4;  // the same, where the processor multiplies bfloat16

// What one matrix multiplies: rows, filled up to whole groups, and where the results go.
struct Job {
  Weight weight;
  std::int64_t rows;
  const float* x;
  const std::uint16_t* narrow;  // the same rows in bfloat16, or null
  std::int64_t x_stride, narrow_stride;
  void* y;
  std::int64_t y_stride;
  bool bfloat16;

  // The rows from `first` on, at most `most`.
  Job some(std::int64_t first, std::int64_t most) const {
    Job part = *this;
    part.rows = rows - first < most ? rows - first : most;
    if (x != nullptr) part.x += first * x_stride;
    if (narrow != nullptr) part.narrow += first * narrow_stride;
    part.y = static_cast<std::uint8_t*>(y) + first * y_stride * (bfloat16 ? 2 : 4);
    return part;
  }

  void put(std::int64_t row, std::int64_t strip, Lanes value) const {
    const std::int64_t at = row * y_stride + strip * lanes, left = weight.outputs - strip * lanes;
    const int count = static_cast<int>(left < lanes ? left : lanes);
    if (bfloat16) {
      store_bfloat16(static_cast<std::uint16_t*>(y) + at, value, count);
    } else if (count == lanes) {
      store(static_cast<float*>(y) + at, value);
    } else {
      store_some(static_cast<float*>(y) + at, value, count);
    }
  }
};

template <class F, int R>
void few_at(const Job& job, const Weight& w, std::int64_t strip, std::int64_t place, std::int64_t row) {
  const float* rows[R];
  Lanes totals[R];
  for (int r = 0; r < R; ++r) rows[r] = job.x + (row + r) * job.x_stride;
  few<F, R>(w, place, rows, totals);
  for (int r = 0; r < R; ++r) job.put(row + r, strip, totals[r]);
}

// Some strips of a matrix against all rows of a job. In `w` the first of them is strip `place`.
template <class F>
void strips_of(const Job& job, const Weight& w, std::int64_t strip, std::int64_t place, int strips) {
  const auto put = [&](std::int64_t row, int s, Lanes value) { job.put(row, strip + s, value); };
#if ABYSSAL_ISA_avx512
  if constexpr (F::format != Format::float32) {
    if (job.narrow != nullptr && job.rows > few_narrow_rows) {
      many<NarrowTile<F>>(w, place, strips, job.narrow, job.narrow_stride, job.rows, put);
      return;
    }
  }
#endif
  if (job.rows > few_rows<F>) {
    many<WideTile<F>>(w, place, strips, job.x, job.x_stride, job.rows, put);
    return;
  }
  for (int s = 0; s < strips; ++s) {
    std::int64_t row = 0;
    for (; row + 4 <= job.rows; row += 4) few_at<F, 4>(job, w, strip + s, place + s, row);
    switch (job.rows - row) {
      case 1: few_at<F, 1>(job, w, strip + s, place + s, row); break;
      case 2: few_at<F, 2>(job, w, strip + s, place + s, row); break;
      case 3: few_at<F, 3>(job, w, strip + s, place + s, row); break;
      default: break;
    }
  }
}

void strips_of(const Job& job, const Weight& w, std::int64_t strip, std::int64_t place, int strips) {
  switch (w.format) {
    case Format::float32: strips_of<Float32>(job, w, strip, place, strips); break;
    case Format::bfloat16: strips_of<Bfloat16>(job, w, strip, place, strips); break;
    case Format::float8: strips_of<Float8>(job, w, strip, place, strips); break;
    case Format::float4: strips_of<Float4>(job, w, strip, place, strips); break;
  }
}

// The same for a weight that lies as in a release: its strips are packed into memory of this task.
void stored_strips_of(const Job& job, std::int64_t strip, int strips) {
  const Weight& w = job.weight;
  const std::int64_t groups = w.groups(), bytes = block_bytes(w.format), row_bytes = bytes_of_row(w.format, w.inputs);
  Buffer<std::uint32_t> blocks(strips * groups * bytes / 4), spare(groups * bytes / 4);
  Buffer<std::uint8_t> scales(w.format == Format::float4 ? strips * groups * lanes : 0);
  Weight own{w.format, strips * lanes, w.inputs, reinterpret_cast<const std::uint8_t*>(&blocks[0]), nullptr, nullptr};
  for (int s = 0; s < strips; ++s) {
    const std::int64_t first = (strip + s) * lanes;
    const std::int64_t count = w.outputs - first < lanes ? w.outputs - first : lanes;
    convert_strip<false>(w.format, const_cast<std::uint8_t*>(w.data) + first * row_bytes, row_bytes, count, groups,
                         &blocks[s * groups * bytes / 4], &spare[0]);
    if (w.format == Format::float4)
      for (std::int64_t g = 0; g < groups; ++g)
        for (std::int64_t lane = 0; lane < lanes; ++lane)
          scales[(s * groups + g) * lanes + lane] =
              lane < count ? w.scales[(first + lane) * groups + g] : std::uint8_t{0};
  }
  if (w.format == Format::float4) own.scales = &scales[0];
  // strips of a task share a row of FP8's tiles
  if (w.format == Format::float8) own.tile_scales = w.tile_scales + strip * lanes / tile_side * w.tiles_across();
  strips_of(job, own, strip, 0, strips);
}
static_assert(tile_side % (tile_strips * lanes) == 0);

// All rows of x, each part of `inputs` columns filled with zeros to whole groups, as float32 or as they are.
template <class To, class From>
void fill_rows(const LinearArgs& a, std::int64_t parts, std::int64_t stride, Buffer<To>& to) {
  const std::int64_t inputs = a.weight.inputs;
  for (std::int64_t r = 0; r < a.rows; ++r)
    for (std::int64_t p = 0; p < parts; ++p) {
      const From* from = static_cast<const From*>(a.x) + r * a.x_stride + p * inputs;
      To* row = &to[(r * parts + p) * stride];
      if constexpr (sizeof(To) == sizeof(From)) {
        std::memcpy(row, from, static_cast<std::size_t>(inputs) * sizeof(To));
      } else {
        std::int64_t i = 0;
        for (; i + lanes <= inputs; i += lanes) store(row + i, load_bfloat16(from + i));
        for (; i < inputs; ++i) row[i] = from_bfloat16(from[i]);
      }
      for (std::int64_t i = inputs; i < stride; ++i) row[i] = To{0};
    }
}

}  // namespace

void linear(const LinearArgs& a) {
  const Weight& w = a.weight;
  if (a.rows == 0 || w.outputs == 0) return;
  const std::int64_t groups = w.groups(), strips = w.strips(), parts = a.columns ? a.matrices : 1;
  const std::int64_t whole = groups * group_inputs;
  const bool ragged = whole != w.inputs;
#if ABYSSAL_ISA_avx512
  const bool narrow = a.bfloat16 && w.format != Format::float32;
#else
  const bool narrow = false;
#endif

  // rows as the tiles read them, in place where possible
  const bool copied = a.bfloat16 || ragged;
  Buffer<float> wide_rows(copied ? a.rows * parts * whole : 0);
  Buffer<std::uint16_t> narrow_rows(narrow && ragged ? a.rows * parts * whole : 0);
  if (copied && a.bfloat16) fill_rows<float, std::uint16_t>(a, parts, whole, wide_rows);
  if (copied && !a.bfloat16) fill_rows<float, float>(a, parts, whole, wide_rows);
  if (narrow_rows.size() > 0) fill_rows<std::uint16_t, std::uint16_t>(a, parts, whole, narrow_rows);

  const std::int64_t row_bytes = bytes_of_row(w.format, w.inputs);
  Buffer<Job> jobs(a.matrices);
  std::int64_t count = 0;
  for (std::int64_t e = 0; e < a.matrices; ++e) {
    const std::int64_t first = a.firsts == nullptr ? 0 : a.firsts[e];
    const std::int64_t rows = (a.firsts == nullptr ? a.rows : a.firsts[e + 1]) - first;
    if (rows <= 0) continue;
    Job job{w, rows, nullptr, nullptr, copied ? parts * whole : a.x_stride, ragged ? parts * whole : a.x_stride,
            a.y, a.y_stride, a.bfloat16};
    job.weight.data += e * (a.stored ? w.outputs * row_bytes : strips * groups * block_bytes(w.format));
    if (w.scales != nullptr) job.weight.scales += e * groups * (a.stored ? w.outputs : strips * lanes);
    if (w.tile_scales != nullptr)
      job.weight.tile_scales += e * ((w.outputs + tile_side - 1) / tile_side) * w.tiles_across();
    const std::int64_t part = a.columns ? e : 0, item = a.bfloat16 ? 2 : 4;
    job.x = (copied ? &wide_rows[0] : static_cast<const float*>(a.x)) + first * job.x_stride +
            part * (copied ? whole : w.inputs);
    if (narrow)
      job.narrow = (ragged ? &narrow_rows[0] : static_cast<const std::uint16_t*>(a.x)) + first * job.narrow_stride +
                   part * (ragged ? whole : w.inputs);
    job.y = static_cast<std::uint8_t*>(a.y) + (first * a.y_stride + part * w.outputs) * item;
    jobs[count++] = job;
  }
  // a task is a set of strips against all rows of a job, or, where that makes too few tasks, against some
  const std::int64_t sets = (strips + tile_strips - 1) / tile_strips;
  const std::int64_t piece = count * sets < 4 * threads() ? block_rows : a.rows;
  Buffer<std::int64_t> ends(count);  // tasks of all jobs up to each
  std::int64_t tasks = 0;
  for (std::int64_t j = 0; j < count; ++j) ends[j] = tasks += sets * ((jobs[j].rows + piece - 1) / piece);
  parallel(
      tasks,
      [&](std::int64_t task) {
        const Flush flush(a.bfloat16);
        std::int64_t j = 0;
        while (task >= ends[j]) ++j;
        const std::int64_t in_job = task - (j > 0 ? ends[j - 1] : 0);
        const Job job = jobs[j].some(in_job / sets * piece, piece);
        const std::int64_t strip = in_job % sets * tile_strips;
        const int here = static_cast<int>(strips - strip < tile_strips ? strips - strip : tile_strips);
        if (a.stored) stored_strips_of(job, strip, here);
        else strips_of(job, job.weight, strip, strip, here);
      },
      a.rows * parts * w.outputs * w.inputs <= small_work ? 1 : 0);
}

}  // namespace abyssal::ABYSSAL_ISA
