"""The native compressor step against the plain pooling in float64, for every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.kernels.choice import choice, forced, native
from abyssal.kernels.pool import compress, pool
from abyssal.kernels.rms_norm import rms_norm
from abyssal.kernels.rotary import rotate_tail

U = 2.0**-24  # unit roundoff of float32
ISAS = choice().supported
EPS = 1e-6
pytestmark = pytest.mark.skipif(not ISAS, reason="no extension")


class Case:
    """Sequences whose tokens were projected long ago and are read in chunks.

    Args:
        lengths: tokens of each sequence.
        ratio, overlap: of the blocks.
    """

    def __init__(self, seed: int, ratio: int, dim: int, rotated: int, overlap: bool, lengths: list[int], size: float):
        g = torch.Generator().manual_seed(seed)
        self.ratio, self.dim, self.overlap, self.lengths = ratio, dim, overlap, lengths
        width = dim * (2 if overlap else 1)
        self.values = [torch.randn(n, width, generator=g) * size for n in lengths]
        self.logits = [torch.randn(n, width, generator=g) * 3 for n in lengths]
        self.ape, self.norm = torch.randn(ratio, width, generator=g), torch.randn(dim, generator=g)
        self.ring_size = ratio * (2 if overlap else 1) + 16
        angle = torch.randn(max(lengths) // ratio + 1, rotated // 2, generator=g)
        self.turn = torch.polar(torch.ones_like(angle), angle)
        self.per_page = 128 // ratio
        self.pages = max(lengths) // 128 + 1
        self.tables = torch.randperm(len(lengths) * self.pages, generator=g).view(len(lengths), self.pages)

    def run(self, chunk: int) -> list[Tensor]:
        """Entries of each sequence, read from the array that the kernel stored them in."""
        module = native()
        assert module is not None
        slots, width = len(self.lengths), self.ape.shape[1]
        nan = float("nan")  # nothing may be read that was not written
        rings = (
            torch.full((slots * self.ring_size, width), nan),
            torch.full((slots * self.ring_size, width), nan),
            self.ring_size,
        )
        entries = torch.zeros(1 + slots * self.pages * self.per_page, self.dim)
        for begin in range(0, max(self.lengths), chunk):
            spans, parts, turns, first, tables = [], [], [], 0, []
            for slot, length in enumerate(self.lengths):
                n = min(length - begin, chunk)
                if n <= 0:
                    continue
                spans.append((first, n, begin, 0, slot, 0))
                parts.append((self.values[slot][begin : begin + n], self.logits[slot][begin : begin + n]))
                turns.append(self.turn[begin // self.ratio : (begin + n) // self.ratio])
                tables.append(self.tables[slot])
                first += n
            values, logits = (torch.cat(x) for x in zip(*parts, strict=True))
            store = (entries, torch.stack(tables), self.per_page)
            out = compress(
                module, values, logits, self.ape, torch.tensor(spans), rings, self.norm, EPS, torch.cat(turns), store
            )
            assert out.isfinite().all()
        numbers = [torch.arange(n // self.ratio) for n in self.lengths]
        return [
            entries[1 + table[b // self.per_page] * self.per_page + b % self.per_page]
            for table, b in zip(self.tables, numbers, strict=True)
        ]

    def check(self, got: list[Tensor]) -> None:
        C, M = self.dim, self.ratio
        for sequence, entries in enumerate(got):
            values = self.values[sequence].double()
            logits = self.logits[sequence].double()
            logits = logits + self.ape.double().repeat(len(logits) // M + 1, 1)[: len(logits)]
            for block, entry in enumerate(entries):
                own = slice(block * M, (block + 1) * M)
                v, l = values[own, -C:], logits[own, -C:]
                if self.overlap and block:
                    before = slice((block - 1) * M, block * M)
                    v, l = torch.cat([values[before, :C], v]), torch.cat([logits[before, :C], l])
                pooled = pool(v[None], l[None])
                want = rms_norm(pooled, self.norm.double(), EPS)
                turn = self.turn[block : block + 1].to(torch.complex128)
                want = rotate_tail(want, turn)[0]
                # each weight is off by the bias, the difference (both grow with the logits) and exp (4 U)
                slots = len(v)
                weight = 4 * U * (l.abs().amax() + 2) + (slots + 8) * U
                off = 2 * weight * v.abs().amax()
                factor = (pooled.square().mean() + EPS).rsqrt()
                scale = self.norm.double().abs().amax() * factor
                # the norm divides by what is off as well; a rotation joins two values
                error = 4 * scale * (off * (1 + factor * pooled.abs().amax()) + (C + 16) * U * pooled.abs().amax())
                assert ((entry - want).abs() <= error).all()


CASES = {
    "csa": Case(0, 4, 34, 8, True, [41, 3, 150], 1.0),
    "keys": Case(1, 4, 64, 64, True, [33], 1.0),
    "hca": Case(2, 128, 96, 32, False, [400, 127, 128], 1.0),
    "huge": Case(3, 4, 16, 4, True, [20], 1e15),
    "tiny": Case(4, 4, 16, 4, True, [20], 1e-15),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_entries_are_as_close_to_the_truth_as_their_sums_allow(name: str, isa: str) -> None:
    with forced(isa):
        CASES[name].check(CASES[name].run(1000))


@pytest.mark.parametrize("name", CASES)
def test_chunks_instruction_sets_and_threads_change_no_bit(name: str) -> None:
    case = CASES[name]
    with forced("scalar"):
        want = case.run(1000)
    for isa in ISAS:
        with forced(isa):
            module = native()
            assert module is not None
            before = module.threads()
            for chunk, threads in ((1, 1), (7, 3), (130, 2)):
                module.set_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(case.run(chunk), want, strict=True))
            module.set_threads(before)


def test_known_blocks_are_not_written_and_what_lies_outside_is_refused() -> None:
    module = native()
    if module is None:
        pytest.skip("reference")
    rings = (torch.zeros(24, 8), torch.zeros(24, 8), 24)
    x, ape, norm, turn = torch.randn(8, 8), torch.zeros(4, 8), torch.ones(4), torch.ones(2, 1, dtype=torch.complex64)
    entries = torch.zeros(33, 4)
    store = (entries, torch.zeros(1, 1, dtype=torch.long), 32)
    known = torch.tensor([(0, 8, 0, 0, 0, 4)])
    out = compress(module, x, x, ape, known, rings, norm, EPS, turn, store)
    assert (entries[1] == 0).all() and torch.equal(entries[2], out[1])
    for bad in ((0, 9, 0, 0, 0, 0), (0, 8, 0, 0, 1, 0), (0, 8, 128, 0, 0, 0), (0, 4, 0, 0, 0, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            compress(module, x, x, ape, torch.tensor([bad]), rings, norm, EPS, turn, store)
