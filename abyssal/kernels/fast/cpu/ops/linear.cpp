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
// The same where the processor multiplies bfloat16, and the rows from which that pays: pairs of FP8 cost more.
template <class F>
constexpr std::int64_t few_narrow_rows = F::format == Format::float4 ? 8 : 4;
constexpr std::int64_t least_narrow_rows(Format format) { return format == Format::float8 ? 3 : 1; }

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

template <class F, int R, class X>
void few_at(const Job& job, const Weight& w, const X* x, std::int64_t stride, std::int64_t strip, std::int64_t place,
            std::int64_t row) {
  const X* rows[R];
  Lanes totals[R];
  for (int r = 0; r < R; ++r) rows[r] = x + (row + r) * stride;
  few<F, R>(w, place, rows, totals);
  for (int r = 0; r < R; ++r) job.put(row + r, strip, totals[r]);
}

template <class F, class X>
void few_rows_of(const Job& job, const Weight& w, const X* x, std::int64_t stride, std::int64_t strip,
                 std::int64_t place, int strips) {
  for (int s = 0; s < strips; ++s) {
    std::int64_t row = 0;
    for (; row + 4 <= job.rows; row += 4) few_at<F, 4>(job, w, x, stride, strip + s, place + s, row);
    switch (job.rows - row) {
      case 1: few_at<F, 1>(job, w, x, stride, strip + s, place + s, row); break;
      case 2: few_at<F, 2>(job, w, x, stride, strip + s, place + s, row); break;
      case 3: few_at<F, 3>(job, w, x, stride, strip + s, place + s, row); break;
      default: break;
    }
  }
}

// Some strips of a matrix against all rows of a job. In `w` the first of them is strip `place`.
template <class F>
void strips_of(const Job& job, const Weight& w, std::int64_t strip, std::int64_t place, int strips) {
  const auto put = [&](std::int64_t row, int s, Lanes value) { job.put(row, strip + s, value); };
#if ABYSSAL_ISA_avx512
  if constexpr (F::format != Format::float32) {
    if (job.narrow != nullptr && job.rows > few_narrow_rows<F>) {
      many<NarrowTile<F>>(w, place, strips, job.narrow, job.narrow_stride, job.rows, put);
      return;
    }
    if (job.narrow != nullptr && scaled<F> && job.rows >= least_narrow_rows(F::format)) {
      few_rows_of<F>(job, w, job.narrow, job.narrow_stride, strip, place, strips);
      return;
    }
  }
#endif
  if (job.rows > few_rows<F>) many<WideTile<F>>(w, place, strips, job.x, job.x_stride, job.rows, put);
  else few_rows_of<F>(job, w, job.x, job.x_stride, strip, place, strips);
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

#if ABYSSAL_ISA_avx512
// The upper halves of float32 numbers. False: one of them needs more, or is so small or large that a sum of products
// with FP4 or FP8 numbers could become subnormal or infinite, where the processor's bfloat16 product rounds in its way.
bool halve(const float* from, std::int64_t count, std::uint16_t* to) {
  const __m512i low = _mm512_set1_epi32(0xffff), least = _mm512_set1_epi32((127 - 60) << 23);
  const __m512i span = _mm512_set1_epi32(120 << 23), size = _mm512_set1_epi32(0x7fffffff);
  for (std::int64_t i = 0; i < count; i += lanes) {
    const __m512i bits = _mm512_loadu_si512(from + i), magnitude = _mm512_and_si512(bits, size);
    const __mmask16 nonzero = _mm512_test_epi32_mask(magnitude, magnitude);
    const __mmask16 beyond =
        _mm512_mask_cmpgt_epu32_mask(nonzero, _mm512_sub_epi32(magnitude, least), span);
    if ((beyond | _mm512_test_epi32_mask(bits, low)) != 0) return false;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  return true;
}

// Rows whose values are bfloat16 numbers, such as those that were rounded to FP8, as such. False if one is not.
bool halve_rows(const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t width, std::uint16_t* to) {
  constexpr std::int64_t step = 8;
  int failed = 0;
  parallel(
      (rows + step - 1) / step,
      [&](std::int64_t task) {
        for (std::int64_t r = task * step; r < (task + 1) * step && r < rows; ++r) {
          if (__atomic_load_n(&failed, __ATOMIC_RELAXED) != 0) return;
          if (!halve(x + r * x_stride, width, to + r * width)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        }
      },
      rows * width <= small_work ? 1 : 0);
  return failed == 0;
}
#endif

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

  // float32 rows that are bfloat16 numbers give the same bits the faster way
  std::int64_t narrow_stride = ragged ? parts * whole : a.x_stride;
  const std::uint16_t* narrow_x = nullptr;
  if (narrow) narrow_x = ragged ? &narrow_rows[0] : static_cast<const std::uint16_t*>(a.x);
#if ABYSSAL_ISA_avx512
  const bool quantised = w.format == Format::float4 || w.format == Format::float8;
  const bool may_narrow = !a.bfloat16 && quantised && a.rows >= least_narrow_rows(w.format);
  Buffer<std::uint16_t> halves(may_narrow ? a.rows * parts * whole : 0);
  if (may_narrow && halve_rows(copied ? &wide_rows[0] : static_cast<const float*>(a.x), copied ? parts * whole : a.x_stride,
                               a.rows, parts * whole, &halves[0])) {
    narrow_x = &halves[0];
    narrow_stride = parts * whole;
  }
#endif

  const std::int64_t row_bytes = bytes_of_row(w.format, w.inputs);
  Buffer<Job> jobs(a.matrices);
  std::int64_t count = 0;
  for (std::int64_t e = 0; e < a.matrices; ++e) {
    const std::int64_t first = a.firsts == nullptr ? 0 : a.firsts[e];
    const std::int64_t rows = (a.firsts == nullptr ? a.rows : a.firsts[e + 1]) - first;
    if (rows <= 0) continue;
    Job job{w, rows, nullptr, nullptr, copied ? parts * whole : a.x_stride, narrow_stride,
            a.y, a.y_stride, a.bfloat16};
    job.weight.data += e * (a.stored ? w.outputs * row_bytes : strips * groups * block_bytes(w.format));
    if (w.scales != nullptr) job.weight.scales += e * groups * (a.stored ? w.outputs : strips * lanes);
    if (w.tile_scales != nullptr)
      job.weight.tile_scales += e * ((w.outputs + tile_side - 1) / tile_side) * w.tiles_across();
    const std::int64_t part = a.columns ? e : 0, item = a.bfloat16 ? 2 : 4;
    job.x = (copied ? &wide_rows[0] : static_cast<const float*>(a.x)) + first * job.x_stride +
            part * (copied ? whole : w.inputs);
    // where rows are not ragged, `whole` is `inputs`
    if (narrow_x != nullptr) job.narrow = narrow_x + first * narrow_stride + part * whole;
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
