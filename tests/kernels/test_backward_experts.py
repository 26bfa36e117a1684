"""The way back of the experts on every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from abyssal.kernels.experts import fused_experts
from abyssal.kernels.swiglu import swiglu_reference
from tests.kernels.native import gamma, needs_native, on_every_isa, same_bits
from tests.kernels.near import Near, flat, gradients

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]


def mixture(chosen: Tensor, limit: float, block: int = 0) -> Callable[..., Tensor]:
    """The kernel as a function of x, gains and three or six weights."""

    def run(x: Tensor, gains: Tensor, *weights: Tensor) -> Tensor:
        stored = [(w, None) for w in weights]
        y = fused_experts(x, gains, chosen, stored[:3], stored[3:], limit, block)
        assert y is not None
        return y

    return run


def mixture_reference(chosen: Tensor, limit: float) -> Callable[..., Tensor]:
    def run(x: Tensor, gains: Tensor, *weights: Tensor) -> Tensor:
        rows = []
        for t, v in enumerate(x):
            y = torch.zeros_like(v)
            for place, e in enumerate(chosen[t].tolist()):
                w1, w3, w2 = (w[e] for w in weights[:3])
                y = y + w2 @ (swiglu_reference(w1 @ v, w3 @ v, limit) * gains[t, place])
            if weights[3:]:
                w1, w3, w2 = weights[3:]
                y = y + w2 @ swiglu_reference(w1 @ v, w3 @ v, limit)
            rows.append(y)
        return torch.stack(rows)

    return run


def mixture_backward(
    chosen: Tensor, limit: float, x: Tensor, gains: Tensor, weights: list[Tensor], dy: Tensor
) -> list[Near]:
    """Gradients of x, gains and weights."""
    dx, dgains = Near.exact(torch.zeros_like(x)), Near.exact(torch.zeros_like(gains))
    found = [Near.exact(torch.zeros_like(w)) for w in weights]

    def pass_back(rows: Tensor, gain: Near, three: list[Tensor]) -> tuple[Near, Near, list[Near]]:
        v, grad = Near.exact(x[rows]), Near.exact(dy[rows])
        w1, w3, w2 = (Near.exact(w) for w in three)
        gate, up = v @ w1.mT, v @ w3.mT
        low, within = gate.clamp(-torch.inf, limit), up.clamp(-limit, limit)
        half = low.sigmoid()
        silu, da = low * half, grad @ w2
        slope = half * (low * (1.0 - half) + 1.0)
        scaled = da * gain.unsqueeze(1)
        dgate = (scaled * within * slope).where(gate.value <= limit)
        dup = (scaled * silu).where(up.value.abs() <= limit)
        active = silu * within * gain.unsqueeze(1)
        dweights = [dgate.mT @ v, dup.mT @ v, grad.mT @ active]
        return dgate @ w1 + dup @ w3, (da * (silu * within)).sum(1), dweights

    for e in range(len(weights[0])):
        rows, places = (chosen == e).nonzero(as_tuple=True)
        dv, dgain, dweights = pass_back(rows, Near.exact(gains[rows, places]), [w[e] for w in weights[:3]])
        dx.value.index_add_(0, rows, dv.value)
        dx.error.index_add_(0, rows, dv.error + gamma(8) * dv.most)
        dgains.value[rows, places], dgains.error[rows, places] = dgain.value, dgain.error
        for to, dw in zip(found[:3], dweights, strict=True):
            to.value[e], to.error[e] = dw.value, dw.error
    if weights[3:]:
        everyone = torch.arange(len(x))
        dv, _, found[3:] = pass_back(everyone, Near.exact(torch.ones(len(x))), weights[3:])
        dx = dx + dv
    # parts that cancel were rounded at their own size
    return [Near(dx.value, dx.error * (1 + gamma(8)) + gamma(8) * dx.most), dgains, *found]


MIXTURES = [(1, 4, 2, 64, 32), (3, 5, 3, 40, 33), (70, 16, 2, 96, 48), (9, 1, 1, 2, 1), (250, 3, 1, 17, 70)]


@pytest.mark.parametrize(("T", "E", "K", "D", "F"), MIXTURES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", [1.0, 25.0])
def test_gradients_of_experts(T: int, E: int, K: int, D: int, F: int, shared: bool, size: float) -> None:
    torch.manual_seed(T + D)
    # the last expert of several has no token
    chosen = torch.stack([torch.randperm(max(E - 1, 1))[:K] for _ in range(T)])
    shapes = [(E, F, D), (E, F, D), (E, D, F)] + ([(F, D), (F, D), (D, F)] if shared else [])
    weights = [torch.randn(s) * s[-1] ** -0.5 * (size if i % 3 < 2 else 1.0) for i, s in enumerate(shapes)]
    inputs, dy = [torch.randn(T, D), torch.rand(T, K), *weights], torch.randn(T, D)
    _, truth = gradients(mixture_reference(chosen, 10.0), [x.double() for x in inputs], [dy])
    near = mixture_backward(chosen, 10.0, inputs[0], inputs[1], weights, dy)
    for found in on_every_isa(lambda: flat(gradients(mixture(chosen, 10.0), inputs, [dy]))):
        assert same_bits(found[0], mixture(chosen, 10.0)(*inputs))
        for bound, got, want in zip(near, found[1:], truth, strict=True):
            bound.holds(got, want)


def test_the_clamp_lets_gradients_of_its_limits_pass() -> None:
    """As torch's: at the limit the gradient passes, beyond it there is none."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    up = torch.tensor([[[2.0, -2.0], [3.0, -2.5]]])
    gate = torch.tensor([[[2.0, 2.5], [-5.0, 1.0]]])
    inputs = [x, torch.ones(2, 1), gate, up, torch.ones(1, 2, 2)]
    chosen, dy = torch.zeros(2, 1, dtype=torch.int64), torch.randn(2, 2)
    _, truth = gradients(mixture_reference(chosen, 2.0), [v.double() for v in inputs], [dy])
    assert (truth[2] == 0).sum() == 1 and (truth[3] == 0).sum() == 2
    for found in on_every_isa(lambda: flat(gradients(mixture(chosen, 2.0), inputs, [dy]))):
        for got, want in zip(found[1:], truth, strict=True):
            torch.testing.assert_close(got, want.float())


def test_gradients_pass_the_rounding_of_experts_as_they_are() -> None:
    torch.manual_seed(0)
    chosen, dy = torch.tensor([[1, 0], [2, 1], [0, 2]]), torch.randn(3, 64)
    shapes = [(3, 32, 64), (3, 32, 64), (3, 64, 32), (32, 64), (32, 64), (64, 32)]
    inputs = [torch.randn(3, 64), torch.rand(3, 2), *(torch.randn(s) * s[-1] ** -0.5 for s in shapes)]
    _, exact = gradients(mixture(chosen, 10.0), inputs, [dy])
    for found in on_every_isa(lambda: flat(gradients(mixture(chosen, 10.0, 32), inputs, [dy]))):
        assert same_bits(found[0], mixture(chosen, 10.0, 32)(*inputs))
        for got, want in zip(found[1:], exact, strict=True):
            # FP8 keeps four bits
            assert 0 < (got - want).abs().max() <= 0.2 * want.abs().max()


def test_no_tokens_have_gradients_of_zero() -> None:
    chosen, dy = torch.zeros(0, 2).long(), torch.zeros(0, 16)
    inputs = [dy, torch.zeros(0, 2), torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.randn(3, 16, 5)]
    for found in on_every_isa(lambda: flat(gradients(mixture(chosen, 10.0), inputs, [dy]))):
        assert found[3].shape == (3, 5, 16) and all(not x.any() for x in found)
