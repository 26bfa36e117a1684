#include "ops/compress.hpp"

#include <array>

#include "check/check.hpp"

namespace abyssal {

void check_compress(const Kernels& kernels) {
  for (const auto& [ratio, dim, overlap, rotated] :
       {std::array<std::int64_t, 4>{1, 1, 0, 0}, {4, 34, 1, 8}, {4, 64, 1, 64}, {128, 96, 0, 32}}) {
    const std::int64_t width = overlap ? 2 * dim : dim, ring_size = ratio * (overlap ? 2 : 1) + 16;
    const std::vector<Span> spans{{0, 3, 253, 0, 1, 0}, {3, 300, 0, 0, 0, 0}, {303, 1, 7, 4, 2, 7}};
    const std::int64_t tokens = 304, per_page = 128 / ratio, pages = 3;
    std::int64_t blocks = 0;
    for (const Span& s : spans) blocks += (s.start + s.length) / ratio - s.start / ratio;
    const std::vector<std::int64_t> tables{8, 7, 6, 5, 4, 3, 2, 1, 0};
    const auto values = normal(tokens * width), logits = normal(tokens * width), ape = normal(ratio * width);
    const auto norm = normal(dim), turn = normal(blocks * rotated + 1);
    const auto old = normal(3 * ring_size * width), entry = normal((1 + 9 * per_page) * dim);
    std::vector<float> ring_values[2] = {old, old}, ring_logits[2] = {old, old}, entries[2] = {entry, entry}, outs[2];
    for (int i = 0; i < 2; ++i) {
      outs[i].resize(static_cast<std::size_t>(blocks * dim + 1));
      const CompressArgs args{3, spans.data(), ratio, dim, overlap != 0, values.data(), logits.data(), ape.data(),
                              ring_values[i].data(), ring_logits[i].data(), ring_size, norm.data(), 1e-6f, rotated,
                              turn.data(), entries[i].data(), {per_page, pages, tables.data()}, outs[i].data()};
      (i == 0 ? kernels : plain()).compress(args);
    }
    ABYSSAL_EXPECT(outs[0] == outs[1]);
    ABYSSAL_EXPECT(entries[0] == entries[1]);
    ABYSSAL_EXPECT(ring_values[0] == ring_values[1]);
    ABYSSAL_EXPECT(ring_logits[0] == ring_logits[1]);
  }
}

}  // namespace abyssal
