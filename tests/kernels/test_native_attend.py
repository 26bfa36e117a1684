"""The native attention against one softmax in float64, for every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from abyssal.kernels import attention
from abyssal.kernels.attention import Blocks, Window, attend, attend_reference
from abyssal.kernels.choice import choice, forced, native
from abyssal.kernels.rms_norm import rms_norm
from abyssal.kernels.rotary import rotate_tail
from abyssal.quant.entry import pack_entry, unpack_entry

U = 2.0**-24  # unit roundoff of float32
ISAS = choice().supported
EPS = 1e-6
pytestmark = pytest.mark.skipif(not ISAS, reason="no extension")


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


class Case:
    """A pass of random sequences: spans, window, blocks in pages, all of them or some.

    The reference is made of the rows that the contract names, query by query.
    """

    def __init__(
        self,
        seed: int,
        heads: int,
        dim: int,
        rotated: int,
        window: int,
        lengths: list[int],
        starts: list[int],
        ratio: int = 0,
        k: int = 0,
        packed: bool = False,
        size: float = 1.0,
    ):
        self.generator = g = torch.Generator().manual_seed(seed)
        self.rotated, self.packed, self.dim, self.ratio, self.window = rotated, packed, dim, ratio, window
        self.lengths, self.starts = lengths, starts
        ring_size, count, sequences = window + 16, sum(lengths), len(lengths)
        firsts = np.concatenate([[0], np.cumsum(lengths)])
        self.spans = torch.tensor(
            [(firsts[i], lengths[i], starts[i], 0, sequences - 1 - i, 0) for i in range(sequences)]
        )
        self.q = torch.randn(count + 3, heads, dim, generator=g)
        angle = torch.randn(count + 3, rotated // 2, generator=g)
        self.turn = torch.polar(torch.ones_like(angle), angle)
        self.sink = torch.randn(heads, generator=g) * 3
        self.fresh = self.stored(torch.randn(count + 3, dim, generator=g) * size)
        self.ring_size = ring_size
        self.ring = self.stored(torch.randn(sequences * ring_size, dim, generator=g) * size)
        self.blocks: Blocks | None = None
        if ratio:
            per_page = 128 // ratio
            pages = max(-(-(s + n) // 128) for s, n in zip(starts, lengths, strict=True))
            self.tables = torch.randperm(sequences * pages, generator=g).view(sequences, pages)
            entries = torch.randn(1 + sequences * pages * per_page, dim, generator=g) * size
            chosen = torch.full((count, k), -1) if k else None
            if chosen is not None:
                for row, visible in enumerate(self.visible()):
                    some = torch.randperm(visible, generator=g)[:k].sort().values
                    chosen[row, : len(some)] = some
            self.blocks = Blocks(ratio, self.stored(entries), self.tables, per_page, chosen)

    def stored(self, x: Tensor) -> Tensor:
        return pack_entry(x, self.rotated) if self.packed else x

    def read(self, x: Tensor) -> Tensor:
        return unpack_entry(x, self.dim, self.rotated, torch.float32) if self.packed else x

    def visible(self) -> list[int]:
        return [
            (p + 1) // self.ratio
            for s, n in zip(self.starts, self.lengths, strict=True)
            for p in range(s, s + n)
        ]

    def run(self) -> Tensor:
        self.written = self.ring.clone()
        near = Window(self.spans, self.fresh, self.written, self.ring_size, self.window)
        module = native()
        assert module is not None
        return attend(module, self.q, self.turn, self.sink, EPS, near, self.blocks)

    def places_of(self, sequence: int, i: int) -> list[tuple[int, int]]:
        """What a token reads in its order: fresh (0), ring (1) or blocks (2), and the row."""
        first, _, start, _, slot, _ = self.spans[sequence].tolist()
        position = start + i
        places = [
            (0, first + p - start) if p >= start else (1, slot * self.ring_size + p % self.ring_size)
            for p in range(max(0, position - self.window + 1), position + 1)
        ]
        if self.blocks is not None:
            numbers = torch.arange((position + 1) // self.ratio)
            if self.blocks.chosen is not None:
                numbers = self.blocks.chosen[first + i]
                numbers = numbers[numbers >= 0]
            per_page = self.blocks.per_page
            page = self.tables[sequence][numbers // per_page]
            places += [(2, row) for row in (1 + page * per_page + numbers % per_page).tolist()]
        return places

    def entries_of(self, sequence: int, i: int) -> Tensor:
        blocks = self.ring if self.blocks is None else self.blocks.entries
        assert blocks is not None
        arrays = (self.fresh, self.ring, blocks)
        return self.read(torch.stack([arrays[a][row] for a, row in self.places_of(sequence, i)]))

    def check(self, got: Tensor) -> None:
        """The error is at most that of q . e, of the softmax and of the weighted sum, each in float32."""
        scale = self.dim**-0.5
        q = rotate_tail(rms_norm(self.q.double(), None, EPS), self.turn.to(torch.complex128).unsqueeze(1))
        for sequence, length in enumerate(self.lengths):
            for i in range(length):
                row = int(self.spans[sequence, 0]) + i
                e = self.entries_of(sequence, i).double()
                mask = torch.ones(1, len(e), dtype=torch.bool)
                want = attend_reference(q[row : row + 1], e, mask, self.sink.double(), scale)
                back = self.turn[row : row + 1].to(torch.complex128).conj().unsqueeze(1)
                want = rotate_tail(want, back)[0]
                # logits: normalisation (dim + 6 roundings), rotation, scale, dim products
                logit = gamma(2 * self.dim + 16) * scale * (q[row].abs() @ e.abs().T).amax(1)
                # each weight is off by that, by exp (4 U) and by a fade for each of the tiles
                tiles = len(e) // 64 + len(e) // 1024 + 2
                weight = 2 * logit + gamma(8 * tiles + 16)
                out = (2 * weight + gamma(len(e) + 8)).unsqueeze(1) * e.abs().amax()
                # turning back joins the errors of two values
                assert ((got[row] - want).abs() <= 2 * out + 1e-37).all()


CASES = {
    "window": Case(0, 3, 20, 6, 5, [1], [0]),
    "two values": Case(1, 1, 2, 2, 1, [1, 2], [0, 7]),
    "window past the ring": Case(2, 4, 96, 32, 64, [1, 150, 3], [300, 0, 62]),
    "chosen": Case(3, 5, 34, 8, 9, [2, 40, 1], [700, 3, 0], ratio=4, k=70),
    "all": Case(4, 6, 48, 48, 7, [3, 1], [200, 2999], ratio=1),
    "many blocks": Case(5, 2, 16, 4, 4, [1], [5000], ratio=1),
    "hca": Case(6, 64, 512, 64, 128, [1, 130], [1100, 100], ratio=128),
    "packed": Case(7, 3, 100, 30, 9, [2, 40], [700, 3], ratio=4, k=20, packed=True),
    "packed, Flash": Case(8, 20, 512, 64, 128, [2], [900], ratio=4, k=200, packed=True),
    "huge": Case(9, 4, 32, 8, 8, [5], [100], ratio=4, k=9, size=1e15),
    "tiny": Case(10, 4, 32, 8, 8, [5], [100], ratio=4, k=9, size=1e-15),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_attend_is_as_close_to_the_truth_as_its_sums_allow(name: str, isa: str) -> None:
    with forced(isa):
        case = CASES[name]
        case.check(case.run())


@pytest.mark.parametrize("name", CASES)
def test_every_instruction_set_gives_the_same_bits(name: str) -> None:
    results = []
    for isa in ISAS:
        with forced(isa):
            results.append(CASES[name].run())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_does_not_depend_on_others_threads_or_how_it_came(isa: str) -> None:
    """One by one, so that earlier tokens lie in the ring, as in one pass; on one thread as on many."""
    lengths, starts = [30, 7], [0, 1990]
    with forced(isa):
        module = native()
        assert module is not None
        case = Case(11, 6, 96, 32, 9, lengths, starts, ratio=1)
        before = module.threads()
        for threads in (1, 3):
            module.set_threads(threads)
            want = case.run()
            ring = case.ring.clone()
            for i in range(max(lengths)):
                spans = [
                    (int(row[0]), 1, int(row[2]) + i, 0, int(row[4]))
                    for row, length in zip(case.spans, lengths, strict=True)
                    if i < length
                ]
                for (first, _, start, since, slot), tables in zip(spans, case.tables, strict=False):
                    span = torch.tensor([(0, 1, start, since, slot, 0)])
                    near = Window(span, case.fresh[first + i : first + i + 1], ring, 25, 9)
                    assert case.blocks is not None
                    far = Blocks(1, case.blocks.entries, tables[None], 128, None)
                    at = slice(first + i, first + i + 1)
                    got = attend(module, case.q[at], case.turn[at], case.sink, EPS, near, far)
                    assert torch.equal(got[0], want[first + i])
            assert torch.equal(ring, case.written)
        module.set_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_of_an_entry_reaches_only_who_reads_it(isa: str) -> None:
    with forced(isa):
        case = Case(12, 4, 32, 8, 8, [20], [0])
        clean = case.run()
        case.fresh[10, 3] = float("nan")
        got = case.run()
        reads = torch.zeros(23, dtype=torch.bool)
        reads[10:18] = True
        assert got[reads].isnan().any(-1).all()
        assert torch.equal(got[~reads], clean[~reads])


def test_what_lies_outside_is_refused() -> None:
    module = native()
    if module is None:
        pytest.skip("reference")
    case = Case(13, 2, 8, 2, 4, [2], [20], ratio=4, k=3)
    assert case.blocks is not None and case.blocks.chosen is not None
    case.blocks.chosen[0, 0] = 99
    with pytest.raises(ValueError, match="outside"):
        case.run()
    case.blocks.chosen[0, 0] = 0
    case.spans[0, 4] = 1
    with pytest.raises(ValueError, match="outside"):
        case.run()


def test_float64_stays_with_the_reference() -> None:
    x = torch.zeros(2)
    assert attention.fast(x.double()) is None
    with forced("reference"):
        assert attention.fast(x) is None
    if native() is not None:
        assert attention.fast(x) is not None
