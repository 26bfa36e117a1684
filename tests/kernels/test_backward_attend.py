"""The way back of attention on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abyssal.kernels.attention import Blocks, Window, attend, attend_reference
from abyssal.kernels.choice import native
from abyssal.kernels.rms_norm import rms_norm
from abyssal.kernels.rotary import rotate_tail
from tests.kernels.native import gamma, needs_native, on_every_isa, same_bits
from tests.kernels.near import EXP, Near, flat, gradients
from tests.kernels.test_native_attend import Case

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]
EPS = 1e-6

ATTENDS = {
    "window": ((0, 3, 20, 6, 5, [1], [0]), {}),
    "two values": ((1, 1, 2, 2, 1, [1, 2], [0, 7]), {}),
    "window past the ring": ((2, 4, 96, 32, 64, [1, 150, 3], [300, 0, 62]), {}),
    "chosen": ((3, 5, 34, 8, 9, [2, 40, 1], [700, 3, 0]), {"ratio": 4, "k": 70}),
    "all": ((4, 6, 48, 16, 7, [3, 1], [200, 999]), {"ratio": 1}),
    "large": ((5, 4, 32, 16, 9, [70, 5], [0, 30]), {"ratio": 4, "size": 6.0}),
}


def arrays_of(case: Case) -> list[Tensor]:
    """Fresh, ring and, if there are any, entries."""
    entries = None if case.blocks is None else case.blocks.entries
    return [case.fresh, case.ring] + ([] if entries is None else [entries])


def attend_backward(case: Case, dout: Tensor) -> list[Near]:
    """Gradients of q, sink, fresh, ring and entries."""
    scale, D = case.dim**-0.5, case.dim
    arrays = arrays_of(case)
    found = [Near.exact(torch.zeros_like(v)) for v in (case.q, case.sink, *arrays)]
    for sequence, length in enumerate(case.lengths):
        for i in range(length):
            row = int(case.spans[sequence, 0]) + i
            places = case.places_of(sequence, i)
            rows = torch.stack([arrays[a][r] for a, r in places])
            e, turn = Near.exact(rows), case.turn[row].unsqueeze(0)
            q, grad = Near.exact(case.q[row]), Near.exact(dout[row])
            factor = ((q * q).sum(1, True) * (1 / D) + EPS).rsqrt()
            scaled = (q * factor).rotated(turn) * scale
            turned = grad.rotated(turn)
            logits = scaled @ e.mT
            sink = case.sink.double().unsqueeze(1)
            weights = torch.cat([logits.value, sink], 1).softmax(1)
            moved = 2 * logits.error.amax(1, keepdim=True) + 2 * EXP + gamma(len(places) + 8 * (len(places) // 64) + 32)
            share = Near(weights, weights * moved.expm1())
            p = share[:, :-1]
            out = (p @ e).rotated(turn, inverse=True).rounded(2)
            dot = (out * grad).sum(1, True)
            ds = p * (turned @ e.mT - dot)
            back = (ds @ e).rotated(turn, inverse=True)
            along = (q * back).sum(1, True) * (1 / D) * (factor * factor)
            dq = (back - q * along) * (factor * scale)
            de = ds.mT @ scaled + p.mT @ turned
            found[0].value[row], found[0].error[row] = dq.value, dq.error
            dsink = -(share[:, -1] * dot[:, 0])
            found[1].value.add_(dsink.value)
            found[1].error.add_(dsink.error + gamma(200) * dsink.most)
            for n, (a, r) in enumerate(places):
                found[2 + a].value[r] += de.value[n]
                found[2 + a].error[r] += de.error[n] + gamma(200) * de.most[n]
    return found


@pytest.mark.parametrize("name", ATTENDS)
def test_gradients_of_attention(name: str) -> None:
    place, named = ATTENDS[name]
    case = Case(*place, **named)  # type: ignore[arg-type]
    dout = torch.randn(case.q.shape)
    inputs = [case.q, case.sink, *arrays_of(case)]

    def plain(q: Tensor, sink: Tensor, *arrays: Tensor) -> Tensor:
        turn = case.turn.to(torch.complex128)
        turned = rotate_tail(rms_norm(q, None, EPS), turn.unsqueeze(1))
        out = torch.zeros_like(q)
        rows, results = [], []
        for sequence, length in enumerate(case.lengths):
            for i in range(length):
                row = int(case.spans[sequence, 0]) + i
                e = torch.stack([arrays[a][r] for a, r in case.places_of(sequence, i)])
                mask = torch.ones(1, len(e), dtype=torch.bool)
                o = attend_reference(turned[row : row + 1], e, mask, sink, case.dim**-0.5)
                results.append(rotate_tail(o, turn[row : row + 1].unsqueeze(1), inverse=True)[0])
                rows.append(row)
        return out.index_copy(0, torch.tensor(rows), torch.stack(results))

    def run(q: Tensor, sink: Tensor, fresh: Tensor, ring: Tensor, *entries: Tensor) -> Tensor:
        module, blocks = native(), None
        assert module is not None
        if case.blocks is not None:
            b = case.blocks
            blocks = Blocks(b.ratio, entries[0], b.tables, b.per_page, b.chosen)
        near = Window(case.spans, fresh, ring, case.ring_size, case.window)
        return attend(module, q, case.turn, sink, EPS, near, blocks, kept=False)

    _, truth = gradients(plain, [x.double() for x in inputs], [dout])
    near = attend_backward(case, dout)
    for found in on_every_isa(lambda: flat(gradients(run, inputs, [dout]))):
        assert same_bits(found[0], case.run())
        for bound, got, want in zip(near, found[1:], truth, strict=True):
            bound.holds(got, want)


def test_pages_of_two_sequences_are_refused() -> None:
    case = Case(3, 2, 16, 4, 9, [2, 40], [700, 3], ratio=4, k=70)
    assert case.blocks is not None and case.blocks.tables is not None
    case.blocks.tables[1] = case.blocks.tables[0]
    module = native()
    assert module is not None
    near = Window(case.spans, case.fresh, case.ring, case.ring_size, case.window)
    q = case.q.clone().requires_grad_()
    out = attend(module, q, case.turn, case.sink, EPS, near, case.blocks, kept=False)
    with pytest.raises(ValueError, match="one sequence"):
        out.sum().backward()
