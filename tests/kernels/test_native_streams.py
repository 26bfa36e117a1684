"""Entering and leaving a sublayer on every instruction set, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abyssal.kernels.rms_norm import rms_norm
from abyssal.kernels.sinkhorn import sinkhorn_reference
from abyssal.kernels.streams import collapse, enter, leave, leave_reference, split_gates
from tests.kernels.native import UNIT, gamma, needs_native, on_every_isa, same_bits

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]
EPS = 1e-6
EXP = 4 * UNIT  # relative error of exp; sigmoid adds a sum and a division


def site(T: int, N: int, D: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    torch.manual_seed(T + N + D)
    rows = (2 + N) * N
    x = torch.randn(T, N, D) * scale
    return x, torch.randn(rows, N * D) * (N * D) ** -0.5, torch.randn(rows), torch.rand(3) * 2


def logits_and_errors(x: Tensor, fn: Tensor, base: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Gates before sigmoid and Sinkhorn in float64, and how far float32 may be from them."""
    flat, fn = x.double().flatten(1), fn.double()
    inverse = torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    g = flat @ fn.T * inverse
    # one total for each of 16 lanes, their tree; the mean of squares as in test_native_norm
    rounded = gamma(flat.shape[1] / 16 + 5) + gamma(flat.shape[1] / 64 + 7) / 2 + gamma(6)
    error = rounded * (flat.abs() @ fn.abs().T) * inverse
    logits = g * factors + base
    return logits, error * factors.abs() + gamma(1) * logits.abs()


SHAPES = [(1, 4, 64), (0, 4, 16), (1, 1, 1), (3, 4, 256), (5, 4, 17), (37, 2, 40), (18, 5, 33), (2, 8, 12)]


@pytest.mark.parametrize(("T", "N", "D"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("iterations", [1, 20])
def test_enter_is_near_the_truth(T: int, N: int, D: int, scale: float, iterations: int) -> None:
    x, fn, base, gate = site(T, N, D, scale)
    factors = gate.double().repeat_interleave(torch.tensor([N, N, N * N]))
    logits, error = logits_and_errors(x, fn, base.double(), factors)
    half = torch.sigmoid(logits[:, : 2 * N])
    # the slope of a sigmoid is at most a quarter
    half_error = error[:, : 2 * N] / 4 + half * (EXP + gamma(2))
    pre, post = half[:, :N] + EPS, 2 * half[:, N:]
    mix = sinkhorn_reference(logits[:, 2 * N :].unflatten(1, (N, N)), iterations, EPS)
    # logarithms of row and column factors each move by as much as those of the matrix in every step, at most
    moved = 2 * error[:, 2 * N :].amax(-1, keepdim=True).unsqueeze(-1) + EXP + gamma(2 * N + 6)
    mix_error = mix * (moved * (1 + 4 * iterations)).expm1()
    pre_error = half_error[:, :N] + gamma(1) * pre
    x64 = x.double()
    y = (pre.unsqueeze(-1) * x64).sum(1)
    y_error = ((pre_error + gamma(N) * pre).unsqueeze(-1) * x64.abs()).sum(1)
    for got, gates in on_every_isa(lambda: enter(x, fn, base, gate, None, EPS, EPS, iterations)):
        got_post, got_mix = split_gates(gates, T) if T else (post, mix)
        assert ((got.double() - y).abs() <= y_error).all()
        assert ((got_post.double() - post).abs() <= 2 * half_error[:, N:]).all()
        assert ((got_mix.double() - mix).abs() <= mix_error).all()


def test_large_logits_stay_finite() -> None:
    x, fn, base, _ = site(5, 4, 32)
    gate = torch.tensor([1e4, 1e4, 1e4])
    for got, gates in on_every_isa(lambda: enter(x, fn, base, gate, None, EPS, EPS, 20)):
        assert got.isfinite().all() and gates.isfinite().all()
        _, mix = split_gates(gates, 5)
        assert (mix.sum(1) - 1).abs().max() < 1e-4


def test_a_broken_token_stays_alone() -> None:
    x, fn, base, gate = site(20, 4, 32)
    norm = torch.randn(32)
    want = enter(x, fn, base, gate, norm, EPS, EPS, 20)
    broken = x.clone()
    broken[3, 1, 5] = float("nan")
    rest = [t for t in range(20) if t != 3]
    for got, gates in on_every_isa(lambda: enter(broken, fn, base, gate, norm, EPS, EPS, 20)):
        assert got[3].isnan().all()
        assert same_bits(got[rest], want[0][rest])
        for a, b in zip(split_gates(gates, 20), split_gates(want[1], 20), strict=True):
            assert a[3].isnan().all() and same_bits(a[rest], b[rest])


@pytest.mark.parametrize(("T", "N", "D"), SHAPES)
def test_tokens_do_not_see_each_other(T: int, N: int, D: int) -> None:
    x, fn, base, gate = site(T, N, D)
    norm = torch.randn(D)
    for got, gates in on_every_isa(lambda: enter(x, fn, base, gate, norm, EPS, EPS, 20)):
        plain, _ = enter(x, fn, base, gate, None, EPS, EPS, 20)
        assert same_bits(got, rms_norm(plain, norm, EPS))
        for t in range(T):
            one, one_gates = enter(x[t : t + 1], fn, base, gate, norm, EPS, EPS, 20)
            assert same_bits(one, got[t : t + 1])
            for a, b in zip(split_gates(one_gates, 1), split_gates(gates, T), strict=True):
                assert same_bits(a, b[t : t + 1])


@pytest.mark.parametrize(("T", "N", "D"), SHAPES)
def test_leave_is_near_the_truth(T: int, N: int, D: int) -> None:
    torch.manual_seed(T)
    x, y, gates = torch.randn(T, N, D), torch.randn(T, D), torch.rand(T * N * (1 + N))
    if not T:
        assert leave(y, x, gates).shape == x.shape
        return
    want = leave_reference(y.double(), x.double(), gates.double())
    size = leave_reference(y.double().abs(), x.double().abs(), gates.double())
    for (got,) in on_every_isa(lambda: (leave(y, x, gates),)):
        assert ((got.double() - want).abs() <= gamma(N + 1) * size).all()
        post, mix = split_gates(gates, T)
        last = torch.cat([post[-1], mix[-1].flatten()])
        assert same_bits(leave(y[-1:], x[-1:], last), got[-1:])


@pytest.mark.parametrize(("T", "N", "D"), [(1, 4, 64), (9, 4, 40), (2, 1, 3)])
def test_the_last_collapse_is_near_the_truth(T: int, N: int, D: int) -> None:
    x, fn, base, gate = site(T, N, D)
    fn, base, gate = fn[:N], base[:N], gate[:1]
    logits, error = logits_and_errors(x, fn, base.double(), gate.double())
    pre = torch.sigmoid(logits) + EPS
    pre_error = error / 4 + pre * (EXP + gamma(3))
    want = (pre.unsqueeze(-1) * x.double()).sum(1)
    bound = ((pre_error + gamma(N) * pre).unsqueeze(-1) * x.double().abs()).sum(1)
    norm = torch.randn(D)
    for got, normed in on_every_isa(
        lambda: (collapse(x, fn, base, gate, None, EPS, EPS), collapse(x, fn, base, gate, norm, EPS, EPS))
    ):
        assert ((got.double() - want).abs() <= bound).all()
        assert same_bits(normed, rms_norm(got, norm, EPS))


def test_sinkhorn_ends_on_columns() -> None:
    x, fn, base, gate = site(6, 4, 16)
    for _, gates in on_every_isa(lambda: enter(x, fn, base, gate, None, EPS, EPS, 20)):
        _, mix = split_gates(gates, 6)
        assert ((mix.sum(1) - 1).abs() < 2 * EPS + gamma(8)).all()
        assert not math.isclose(float((mix.sum(2) - 1).abs().max()), 0, abs_tol=1e-9)
