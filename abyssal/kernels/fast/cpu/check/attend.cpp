#include "ops/attend.hpp"

#include <cstring>

#include "check/check.hpp"

namespace abyssal {

namespace {

void check_case(const Kernels& kernels, bool packed, std::int64_t heads, std::int64_t dim, std::int64_t rotated,
                std::int64_t ratio, std::int64_t k) {
  const std::int64_t window = 9, ring_size = 25, per_page = 128 / (ratio > 0 ? ratio : 1), plain_dim = dim - rotated;
  const std::vector<Span> spans{{0, 3, 2000, 0, 1, 0}, {3, 30, 0, 0, 0, 0}, {33, 1, 5, 3, 2, 0}};
  const std::int64_t tokens = 34, pages = 16;
  const std::int64_t bytes = packed ? (plain_dim + 2 * rotated + (plain_dim + 63) / 64 + 7) / 8 * 8 : 4 * dim;
  const auto array = [&](std::int64_t rows) {
    std::vector<std::uint8_t> data(static_cast<std::size_t>(rows * bytes));
    const auto values = normal(rows * dim);
    if (!packed) std::memcpy(data.data(), values.data(), data.size());
    else
      for (auto& byte : data) byte = static_cast<std::uint8_t>(random_below(70));
    return data;
  };
  const auto fresh = array(tokens), entries = array(1 + 3 * pages * per_page), start = array(3 * ring_size);
  std::vector<std::int64_t> tables, blocks;
  for (std::int64_t i = 3 * pages; i-- > 0;) tables.push_back(i);
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t i = 0; i < k; ++i) blocks.push_back(i < t ? i * 3 : -1);
  const auto q = normal(tokens * heads * dim), turn = normal(tokens * rotated), sink = normal(heads);
  const auto dout = normal(tokens * heads * dim);
  std::vector<float> outs[2], grads[2][5];
  std::vector<std::uint8_t> rings[2] = {start, start};
  for (int i = 0; i < 2; ++i) {
    outs[i].resize(q.size());
    const Stored stored = packed ? Stored::entry : Stored::float32;
    AttendArgs a{};
    a.sequences = 3;
    a.spans = spans.data();
    a.heads = heads;
    a.dim = dim;
    a.rotated = rotated;
    a.out = outs[i].data();
    a.q = q.data();
    a.turn = turn.data();
    a.sink = sink.data();
    a.eps = 1e-6f;
    a.scale = 0.3f;
    a.window = window;
    a.ring_size = ring_size;
    a.fresh = {stored, fresh.data(), bytes, dim, rotated};
    a.ring = {stored, rings[i].data(), bytes, dim, rotated};
    a.kept = true;
    a.ratio = ratio;
    a.entries = {stored, entries.data(), bytes, dim, rotated};
    a.pages = {per_page, pages, tables.data()};
    a.blocks = k > 0 ? blocks.data() : nullptr;
    a.k = k;
    (i == 0 ? kernels : plain()).attend(a);
    if (packed) continue;
    const std::size_t sizes[] = {q.size(), sink.size(), fresh.size() / 4, start.size() / 4, entries.size() / 4};
    for (int j = 0; j < 5; ++j) grads[i][j].resize(sizes[j]);
    (i == 0 ? kernels : plain())
        .attend_backward({a, dout.data(), grads[i][0].data(), grads[i][1].data(), grads[i][2].data(),
                          grads[i][3].data(), grads[i][4].data()});
  }
  for (int j = 0; j < 5; ++j) ABYSSAL_EXPECT(grads[0][j] == grads[1][j]);
  ABYSSAL_EXPECT(std::memcmp(outs[0].data(), outs[1].data(), outs[0].size() * sizeof(float)) == 0);
  ABYSSAL_EXPECT(rings[0] == rings[1]);
}

}  // namespace

// the way back is compared in check_attend, on the same cases
void check_attend_backward(const Kernels&) {}

void check_attend(const Kernels& kernels) {
  for (const bool packed : {false, true}) {
    check_case(kernels, packed, 1, 4, 2, 0, 0);
    check_case(kernels, packed, 5, 96, 32, 4, 70);
    check_case(kernels, packed, 3, 100, 30, 128, 0);
    check_case(kernels, packed, 18, 65, 0, 1, 0);
  }
}

}  // namespace abyssal
