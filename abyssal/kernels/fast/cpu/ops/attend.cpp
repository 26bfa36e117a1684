#include "ops/attend.hpp"

#include "ops/attend_list.hpp"
#include "ops/softmax_tile.hpp"
#include "parallel.hpp"

namespace abyssal::ABYSSAL_ISA {

namespace {

// A query reads its window, oldest first, then its blocks in rising order, as one list. The list is cut into tiles,
// tiles into segments; a segment is read for itself and joined to those before it. So the order of every sum depends
// on the query's position alone, and segments can be read side by side.
constexpr std::int64_t segment_entries = 16 * tile_entries;
constexpr std::int64_t least_heads = 4;       // heads that are worth a task, for which entries are unpacked anew
constexpr std::int64_t small_work = 1 << 18;  // products that do not pay for a second thread

void finish(const AttendArgs& a, std::int64_t token, std::int64_t head, std::int64_t heads, std::int64_t stride,
            const State& state) {
  const std::int64_t plain = a.dim - a.rotated;
  const float* turn = a.turn + token * a.rotated;
  for (std::int64_t h = 0; h < heads; ++h) {
    const float total = state.total[h] + exp_falling(a.sink[head + h] - state.largest[h]);
    float* to = a.out + (token * a.heads + head + h) * a.dim;
    for (std::int64_t c = 0; c < a.dim; ++c) to[c] = state.out[h * stride + c] / total;
    turn_pairs<true>(to + plain, turn, a.rotated / 2);
  }
}

// Some heads of one query read a segment.
void read_segment(const List& list, std::int64_t segment, const float* q, std::int64_t heads, const float* sink,
                  Tile& tile, const State& state) {
  const AttendArgs& a = list.a;
  state.clear(sink, heads, tile.stride);
  const std::int64_t stop =
      (segment + 1) * segment_entries < list.count() ? (segment + 1) * segment_entries : list.count();
  for (std::int64_t first = segment * segment_entries; first < stop; first += tile_entries) {
    tile.here = stop - first < tile_entries ? static_cast<int>(stop - first) : tile_entries;
    for (int i = 0; i < tile.here; ++i) {
      float* space = tile.space_of(i);
      const float* row = list.row(first + i, space);
      if (a.dim != tile.stride) {
        if (row != space) std::memcpy(space, row, static_cast<std::size_t>(a.dim) * sizeof(float));
        for (std::int64_t c = a.dim; c < tile.stride; ++c) space[c] = 0.0f;
        row = space;
      }
      tile.rows[i] = row;
    }
    tile.turn();
    read_tile(q, tile, state, heads);
  }
}

void write_ring(const AttendArgs& a) {
  for (std::int64_t g = 0; g < a.sequences; ++g) {
    const Span& span = a.spans[g];
    for (std::int64_t i = span.length > a.ring_size ? span.length - a.ring_size : 0; i < span.length; ++i) {
      const std::int64_t row = span.slot * a.ring_size + (span.start + i) % a.ring_size;
      std::memcpy(const_cast<std::uint8_t*>(a.ring.data) + row * a.ring.bytes,
                  a.fresh.data + (span.first + i) * a.fresh.bytes, static_cast<std::size_t>(a.ring.bytes));
    }
  }
}

}  // namespace

void attend(const AttendArgs& a) {
  if (a.sequences == 0) return;
  const std::int64_t tokens = a.spans[a.sequences - 1].first + a.spans[a.sequences - 1].length;
  const std::int64_t stride = (a.dim + lanes - 1) / lanes * lanes;
  Buffer<std::int64_t> sequence_of(tokens), segments_of(tokens);
  std::int64_t most = 1, entries = 0;
  for (std::int64_t g = 0; g < a.sequences; ++g)
    for (std::int64_t t = a.spans[g].first; t < a.spans[g].first + a.spans[g].length; ++t) {
      const List list(a, g, t);
      sequence_of[t] = g;
      segments_of[t] = (list.count() + segment_entries - 1) / segment_entries;
      if (segments_of[t] > most) most = segments_of[t];
      entries += list.count();
    }
  const bool alone = entries * a.heads * a.dim < small_work;
  const bool few = !alone && tokens < 4 * threads();
  // entries are unpacked once for the heads of a task: few queries share them out only where there is too little work
  std::int64_t heads = a.heads;
  while (few && heads >= 2 * least_heads && tokens * most * (a.heads / heads) < 2 * threads()) heads = (heads + 1) / 2;
  const std::int64_t parts = (a.heads + heads - 1) / heads;
  const std::int64_t size = State::size(heads, stride);
  if (!few || most == 1) {
    parallel(
        tokens * parts,
        [&](std::int64_t i) {
          const std::int64_t token = i / parts, head = i % parts * heads;
          const std::int64_t here = a.heads - head < heads ? a.heads - head : heads;
          const List list(a, sequence_of[token], token);
          Tile tile(stride, here);
          Buffer<float> q(here * stride), memory(2 * size);
          const State state = State::at(&memory[0], here), later = State::at(&memory[size], here);
          prepare(a, token, head, here, stride, &q[0]);
          read_segment(list, 0, &q[0], here, a.sink + head, tile, state);
          for (std::int64_t s = 1; s < segments_of[token]; ++s) {
            read_segment(list, s, &q[0], here, a.sink + head, tile, later);
            join(state, later, here, stride);
          }
          finish(a, token, head, here, stride, state);
        },
        alone ? 1 : 0);
  } else {
    Buffer<float> memory(tokens * parts * most * size);
    parallel(tokens * parts * most, [&](std::int64_t i) {
      const std::int64_t segment = i % most, token = i / most / parts, head = i / most % parts * heads;
      const std::int64_t here = a.heads - head < heads ? a.heads - head : heads;
      if (segment >= segments_of[token]) return;
      const List list(a, sequence_of[token], token);
      Tile tile(stride, here);
      Buffer<float> q(here * stride);
      prepare(a, token, head, here, stride, &q[0]);
      read_segment(list, segment, &q[0], here, a.sink + head, tile, State::at(&memory[i * size], here));
    });
    const std::int64_t pieces = (heads + least_heads - 1) / least_heads;
    parallel(tokens * parts * pieces, [&](std::int64_t i) {
      const std::int64_t part = i / pieces, token = part / parts, piece = i % pieces * least_heads;
      const std::int64_t head = part % parts * heads, all_here = a.heads - head < heads ? a.heads - head : heads;
      if (piece >= all_here) return;
      const std::int64_t here = all_here - piece < least_heads ? all_here - piece : least_heads;
      const auto state_of = [&](std::int64_t s) {
        return State::at(&memory[(part * most + s) * size], all_here).from(piece, stride);
      };
      for (std::int64_t s = 1; s < segments_of[token]; ++s) join(state_of(0), state_of(s), here, stride);
      finish(a, token, head + piece, here, stride, state_of(0));
    });
  }
  if (a.kept) write_ring(a);
}

}  // namespace abyssal::ABYSSAL_ISA
