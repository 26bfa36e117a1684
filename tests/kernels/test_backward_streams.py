"""The way back of entering and leaving a sublayer, on every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from abyssal.kernels.rms_norm import rms_norm_reference
from abyssal.kernels.streams import (
    collapse,
    collapse_reference,
    enter,
    enter_reference,
    leave,
    leave_reference,
    split_gates,
)
from tests.kernels.native import gamma, needs_native, on_every_isa, same_bits
from tests.kernels.near import EXP, Near, flat, gradients

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]
EPS = 1e-6


def sinkhorn_backward(logits: Near, grad: Tensor, iterations: int) -> Near:
    """The gradient of a matrix's logits, [T, N, N].

    Each step is linear in the gradient, and made of numbers with a relative error that grows by the step (see
    test_native_streams). What a step adds to the error goes through the later steps as they are: a sum of bounds
    for each of them would double in every step.
    """
    T, N, _ = logits.value.shape
    moved = 2 * logits.error.amax((-1, -2), keepdim=True) + EXP + gamma(2 * N + 6)
    share = logits.value.softmax(-1)
    mix, steps = share + EPS, []
    for step in range(2 * iterations - 1):
        axis = -2 if step % 2 == 0 else -1
        factor = 1 / (mix.sum(axis, keepdim=True) + EPS)
        mix = mix * factor
        steps.append((axis, mix, factor, moved * (3 + 2 * step)))
    errors = torch.zeros(T, 0, N, N, dtype=torch.float64)
    value = grad.double()
    for axis, result, factor, relative in [*reversed(steps), (-1, share, share, moved)]:
        shared = (value * result).sum(axis, keepdim=True)
        size = (value * result).abs().sum(axis, keepdim=True)
        new = factor * ((gamma(N + 4) + 2 * relative) * size + (gamma(3) + relative) * value.abs())
        value = (value - shared) * factor
        own, around = result.unsqueeze(1), factor.unsqueeze(1)
        errors = (errors - (errors * own).sum(axis, keepdim=True)) * around
        errors = torch.cat([errors, torch.diag_embed(new.flatten(1)).unflatten(-1, (N, N))], dim=1)
    return Near(value, errors.abs().sum(1) * 1.01)


def site_backward(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, dy: Tensor, dgates: Tensor | None, rounds: int
) -> list[Near]:
    """Gradients of streams, fn, base, scale and norm."""
    T, N, D = x.shape
    x_TND, flat, fn_GW, gain, dx = (Near.exact(v) for v in (x, x.flatten(1), fn, norm, dy))
    kinds = torch.tensor([0] * N if dgates is None else [0] * N + [1] * N + [2] * N * N)
    factors = Near.exact(scale[kinds])
    inverse = ((flat * flat).sum(1, True) * (1 / (N * D)) + EPS).rsqrt()
    g = flat @ fn_GW.mT * inverse
    logits = g * factors + Near.exact(base)
    half = logits[:, : 2 * N].sigmoid()
    slope = half * (1.0 - half)
    pre = half[:, :N] + EPS
    u = (pre.unsqueeze(-1) * x_TND).sum(1)
    factor = ((u * u).sum(1, True) * (1 / D) + EPS).rsqrt()
    unit = u * factor
    mean = (dx * gain * unit).sum(1, True) * (1 / D)
    du = (dx * gain - unit * mean) * factor
    dpre = (du.unsqueeze(1) * x_TND).sum(2)
    parts = [dpre * slope[:, :N]]
    if dgates is not None:
        dpost, dmix = split_gates(dgates, T)
        comb = logits[:, 2 * N :]
        comb = Near(comb.value.unflatten(1, (N, N)), comb.error.unflatten(1, (N, N)))
        dcomb = sinkhorn_backward(comb, dmix, rounds)
        parts.append(Near.exact(dpost) * (slope[:, N:] + slope[:, N:]))
        parts.append(Near(dcomb.value.flatten(1), dcomb.error.flatten(1)))
    grad = Near(torch.cat([p.value for p in parts], 1), torch.cat([p.error for p in parts], 1))
    product = grad * g
    share = -((product * factors).sum(1, True) * (inverse * inverse) * (1 / (N * D)))
    dp = grad * factors * inverse
    own = (du.unsqueeze(1) * pre.unsqueeze(-1)) + share.unsqueeze(-1) * x_TND
    through = dp @ fn_GW
    dstreams = own + Near(through.value.view(T, N, D), through.error.view(T, N, D))
    dscale = [product[:, kinds == kind].sum(1).sum(0) for kind in range(len(scale))]
    stacked = Near(torch.stack([s.value for s in dscale]), torch.stack([s.error for s in dscale]))
    return [dstreams, dp.mT @ flat, grad.sum(0), stacked, (dx * unit).sum(0)]


SITES = [(1, 4, 64), (1, 1, 1), (3, 2, 7), (37, 4, 40), (18, 5, 33), (2, 8, 12), (5, 3, 100), (300, 4, 16), (9, 6, 17)]


def site(T: int, N: int, D: int, size: float) -> list[Tensor]:
    torch.manual_seed(T + N + D)
    rows = (2 + N) * N
    fn, gates = torch.randn(rows, N * D) * (N * D) ** -0.5, torch.rand(3) * 2 * size
    return [torch.randn(T, N, D), fn, torch.randn(rows), gates, torch.randn(D)]


def entering(rounds: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *inputs: enter(*inputs, EPS, EPS, rounds)


@pytest.mark.parametrize(("T", "N", "D"), SITES)
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("rounds", [1, 20])
def test_gradients_of_entering(T: int, N: int, D: int, size: float, rounds: int) -> None:
    inputs = site(T, N, D, size)
    weights = [torch.randn(T, D), torch.randn(T * N * (1 + N))]

    def plain(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        y, gates = enter_reference(x, fn, base, scale, EPS, EPS, rounds)
        return rms_norm_reference(y, norm, EPS), gates

    _, truth = gradients(plain, [x.double() for x in inputs], weights)
    near = site_backward(*inputs, weights[0], weights[1], rounds)
    for found in on_every_isa(lambda: flat(gradients(entering(rounds), inputs, weights))):
        assert all(same_bits(*pair) for pair in zip(found, entering(rounds)(*inputs), strict=False))
        for bound, got, want in zip(near, found[2:], truth, strict=True):
            bound.holds(got, want)


@pytest.mark.parametrize(("T", "N", "D"), SITES)
def test_gradients_of_the_last_collapse(T: int, N: int, D: int) -> None:
    x, fn, base, scale, norm = site(T, N, D, 1.0)
    inputs, weights = [x, fn[:N], base[:N], scale[:1], norm], [torch.randn(T, D)]

    def plain(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor) -> Tensor:
        return rms_norm_reference(collapse_reference(x, fn, base, scale, EPS, EPS), norm, EPS)

    _, truth = gradients(plain, [x.double() for x in inputs], weights)
    near = site_backward(*inputs, weights[0], None, 0)
    for found in on_every_isa(lambda: flat(gradients(lambda *a: collapse(*a, EPS, EPS), inputs, weights))):
        assert same_bits(found[0], collapse(*inputs, EPS, EPS))
        for bound, got, want in zip(near, found[1:], truth, strict=True):
            bound.holds(got, want)


def test_gradients_of_entering_without_a_norm_and_of_large_logits() -> None:
    inputs = site(40, 4, 32, 1.0)[:4]
    weights = [torch.randn(40, 32), torch.randn(40 * 20)]
    _, truth = gradients(lambda *a: enter_reference(*a, EPS, EPS, 20), [x.double() for x in inputs], weights)
    for found in on_every_isa(lambda: flat(gradients(lambda *a: enter(*a, None, EPS, EPS, 20), inputs, weights))):
        for got, want in zip(found[2:], truth, strict=True):
            assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()
    inputs[3] = torch.tensor([1e4, 1e4, 1e4])
    for found in on_every_isa(lambda: flat(gradients(lambda *a: enter(*a, None, EPS, EPS, 20), inputs, weights))):
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize(("T", "N", "D"), SITES)
def test_gradients_of_leaving(T: int, N: int, D: int) -> None:
    torch.manual_seed(T)
    inputs, weights = [torch.randn(T, D), torch.randn(T, N, D), torch.rand(T * N * (1 + N))], [torch.randn(T, N, D)]
    _, truth = gradients(leave_reference, [x.double() for x in inputs], weights)
    y, x, grad = Near.exact(inputs[0]), Near.exact(inputs[1]), Near.exact(weights[0])
    post, mix = (Near.exact(v) for v in split_gates(inputs[2], T))
    dpost, dmix = (grad * y.unsqueeze(1)).sum(2), x @ grad.mT
    dgates = Near(*(torch.cat([getattr(dpost, n).flatten(), getattr(dmix, n).flatten()]) for n in ("value", "error")))
    near = [(post.unsqueeze(-1) * grad).sum(1), mix @ grad, dgates]
    for found in on_every_isa(lambda: flat(gradients(leave, inputs, weights))):
        assert same_bits(found[0], leave(*inputs))
        for bound, got, want in zip(near, found[1:], truth, strict=True):
            bound.holds(got, want)


def test_no_tokens_have_gradients_of_zero() -> None:
    inputs, weights = site(0, 4, 16, 1.0), [torch.zeros(0, 16), torch.zeros(0)]
    for found in on_every_isa(lambda: flat(gradients(entering(20), inputs, weights))):
        assert found[3].shape == inputs[1].shape and all(not x.any() for x in found)
