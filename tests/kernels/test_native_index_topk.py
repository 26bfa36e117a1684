"""The native choice of blocks against scores in float64, for every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.kernels.choice import choice, forced, native
from abyssal.kernels.index_topk import choose_reference, choose_rows
from abyssal.quant.entry import pack_index_key, unpack_index_key
from abyssal.quant.fp4 import fake_fp4

U = 2.0**-24  # unit roundoff of float32
ISAS = choice().supported
pytestmark = pytest.mark.skipif(not ISAS, reason="no extension")


class Case:
    """Queries of several sequences over keys in shuffled pages.

    Args:
        whole: small integers, whose scores are exact and often equal.
    """

    def __init__(
        self, seed: int, heads: int, dim: int, visible: list[list[int]], k: int, packed: bool = False,
        whole: bool = False, size: float = 1.0,
    ):
        g = torch.Generator().manual_seed(seed)
        self.k = k
        count = sum(map(len, visible))
        self.firsts = torch.tensor([sum(map(len, visible[:i])) for i in range(len(visible) + 1)])
        self.visible = torch.tensor([n for part in visible for n in part], dtype=torch.long)
        pages = max(int(self.visible.max()) // 32 + 1, 1) if count else 1
        self.tables = torch.randperm(len(visible) * pages, generator=g).view(len(visible), pages)
        rows = 1 + len(visible) * pages * 32

        def values(*shape: int) -> Tensor:
            if whole:
                return torch.randint(-1, 2, shape, generator=g).float()
            return torch.randn(shape, generator=g) * size

        self.q, self.weights = values(count + 2, heads, dim), values(count + 2, heads)
        keys = values(rows, dim)
        self.keys = pack_index_key(keys) if packed else keys
        self.wide = unpack_index_key(self.keys, torch.float32).double() if packed else keys.double()

    def run(self) -> Tensor:
        module = native()
        assert module is not None
        return choose_rows(
            module, self.q, self.weights, self.visible, self.firsts, self.tables, self.keys, 32, self.k
        )

    def scores(self, query: int) -> tuple[Tensor, Tensor]:
        """Scores in float64 of what a query sees, and how far float32 may be off."""
        sequence = int((self.firsts <= query).sum()) - 1
        numbers = torch.arange(int(self.visible[query]))
        keys = self.wide[1 + self.tables[sequence][numbers // 32] * 32 + numbers % 32]
        q, w = self.q[query].double(), self.weights[query].double()
        n = self.q.shape[1] + self.q.shape[2] + 4
        sizes = (w.abs().unsqueeze(1) * (q.abs() @ keys.abs().T)).sum(0)
        return (w.unsqueeze(1) * (q @ keys.T).relu()).sum(0), n * U / (1 - n * U) * sizes


CASES = {
    "one of each": Case(0, 1, 2, [[1]], 1),
    "nothing": Case(1, 3, 8, [[]], 4),
    "none visible": Case(2, 3, 8, [[0, 0, 1]], 4),
    "all visible": Case(3, 5, 34, [[7], [3, 8]], 8),
    "odd": Case(4, 5, 33, [[99, 100], [45, 333, 334], [9]], 7),
    "ties": Case(5, 2, 4, [[500, 501], [77]], 9, whole=True),
    "many ties": Case(6, 1, 2, [[9000]], 100, whole=True),
    "many keys": Case(7, 16, 64, [[20000], [19999]], 64),
    "many queries": Case(8, 7, 40, [list(range(600, 640))], 20),
    "packed": Case(9, 9, 64, [[700, 701], [345]], 17, packed=True),
    "packed, odd": Case(10, 3, 46, [[700], [345]], 17, packed=True),
    "huge": Case(11, 4, 32, [[300]], 17, size=1e11),
    "tiny": Case(12, 4, 32, [[300]], 17, size=1e-11),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_the_choice_is_as_good_as_float32_allows(name: str, isa: str) -> None:
    """Nothing that was left out is better than what was chosen by more than both may be off."""
    case = CASES[name]
    with forced(isa):
        chosen = case.run()
    assert chosen.shape == (len(case.visible), case.k)
    for query, row in enumerate(chosen):
        visible = int(case.visible[query])
        numbers = row[row >= 0]
        assert len(numbers) == min(visible, case.k)
        assert (row[len(numbers) :] == -1).all()
        assert (numbers.diff() > 0).all()
        assert not len(numbers) or numbers[-1] < visible
        if visible > case.k:
            scores, error = case.scores(query)
            out = torch.ones(visible, dtype=torch.bool)
            out[numbers] = False
            assert (scores - error)[out].max() <= (scores + error)[numbers].min()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["ties", "many ties"])
def test_ties_go_to_the_lowest_block(name: str, isa: str) -> None:
    """Scores of small integers are exact, so the choice is that of the plain meaning."""
    case = CASES[name]
    with forced(isa):
        chosen = case.run()
    for query, row in enumerate(chosen):
        scores, _ = case.scores(query)
        assert torch.equal(row, choose_reference(scores[None], case.visible[query : query + 1], case.k)[0])


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_depends_on_nothing_but_itself(isa: str) -> None:
    case = Case(20, 6, 40, [list(range(400, 440)), [5000]], 30)
    with forced(isa):
        module = native()
        assert module is not None
        want = case.run()
        before = module.threads()
        for threads in (1, 3):
            module.set_threads(threads)
            assert torch.equal(case.run(), want)
            for query in (0, 7, 39, 40):
                table = case.tables[int(query == 40)][None]
                at = slice(query, query + 1)
                got = choose_rows(
                    module, case.q[at], case.weights[at], case.visible[at], torch.tensor([0, 1]), table, case.keys,
                    32, 30,
                )  # fmt: skip
                assert torch.equal(got[0], want[query])
        module.set_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [9, 64])
@pytest.mark.parametrize("rounded", [False, True])
def test_packed_keys_give_the_choice_of_their_values(isa: str, rounded: bool, heads: int) -> None:
    """Queries of FP4 numbers, too, which meet packed keys as integers."""
    packed = Case(21, heads, 128, [[3000, 3001], [1345]], 50, packed=True)
    if rounded:
        packed.q = fake_fp4(packed.q * torch.logspace(-8, 8, len(packed.q)).view(-1, 1, 1))
        packed.q[:, 0, 32:64] = 0
        packed.keys[5:9, 64:] = 20  # a scale far from 1
    with forced(isa):
        want = packed.run()
        packed.keys = unpack_index_key(packed.keys, torch.float32)
        assert torch.equal(packed.run(), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [32, 64, 96, 160])
@pytest.mark.parametrize("apart", [2, 4, 6])
def test_packed_keys_with_scales_apart(isa: str, dim: int, apart: int) -> None:
    """Groups of a vector whose scales differ: up to 8 times they meet as integers, beyond that they do not."""
    packed = Case(24, 7, dim, [[2000, 2001, 333], [1345]], 40, packed=True)
    generator = torch.Generator().manual_seed(apart)
    groups = dim // 32
    powers = torch.randint(0, apart, (len(packed.keys), groups), generator=generator, dtype=torch.uint8)
    packed.keys[:, dim // 2 :] = 120 + powers
    packed.keys[3:40:5, :16] = 0x80  # zeros of both signs
    packed.keys[77, dim // 2] = 0
    factors = torch.randint(0, apart, (*packed.q.shape[:2], groups, 1), generator=generator)
    packed.q = fake_fp4(packed.q.unflatten(-1, (groups, 32)) * 2.0**factors).flatten(-2)
    packed.q[1, :3] = 0
    packed.weights[2] *= 2.0**-40
    with forced(isa):
        want = packed.run()
        packed.keys = unpack_index_key(packed.keys, torch.float32)
        assert torch.equal(packed.run(), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("code", [0x00, 0x11])
def test_a_scale_that_is_nan(isa: str, code: int) -> None:
    """Its score is NaN, which is chosen, where its values are zeros too."""
    case = Case(25, 4, 64, [[900]], 3, packed=True)
    case.q = fake_fp4(case.q)
    row = int(1 + case.tables[0][0] * 32 + 6)
    case.keys[row, :16], case.keys[row, 32] = code, 255
    with forced(isa):
        assert 6 in case.run()[0].tolist()


@pytest.mark.parametrize("isa", ISAS)
def test_infinity_and_nan_are_the_largest(isa: str) -> None:
    case = Case(22, 1, 4, [[40]], 3)
    case.q.fill_(1.0)
    case.weights.fill_(1.0)
    case.keys[:, 0] = torch.where(case.keys[:, 0] < 0, case.keys[:, 0], 0)
    row = {block: int(1 + case.tables[0][block // 32] * 32 + block % 32) for block in (5, 17)}
    case.keys[row[5]] = float("inf")
    case.keys[row[17]] = float("nan")
    with forced(isa):
        assert {5, 17} <= set(case.run()[0].tolist())


def test_what_lies_outside_is_refused() -> None:
    if native() is None:
        pytest.skip("reference")
    case = Case(23, 2, 4, [[40]], 3)
    case.visible[0] = 65
    with pytest.raises(ValueError, match="outside"):
        case.run()
