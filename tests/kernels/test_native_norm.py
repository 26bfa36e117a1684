"""RMSNorm and rotation on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

from abyssal.kernels.choice import forced
from abyssal.kernels.rms_norm import rms_norm, rms_norm_reference
from abyssal.kernels.rotary import norm_and_rotate, rotate_tail, rotate_tail_reference, rotations
from tests.kernels.native import UNIT, gamma, needs_native, on_every_isa, same_bits

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]


def norm_error(width: int) -> float:
    """Of a normed value: squares in 64 sums and their tree (halved by the root), then eight roundings more."""
    return gamma(width / 64 + 7) / 2 + gamma(8)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-3, 1e17])
@pytest.mark.parametrize("shape", [(1, 1), (0, 7), (3, 15), (2, 16), (5, 64), (2, 3, 65), (700, 96), (2, 4099)])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_is_near_the_truth(shape: tuple[int, ...], weighted: bool, scale: float) -> None:
    torch.manual_seed(len(shape) + shape[-1])
    x = torch.randn(shape) * scale
    w = torch.randn(shape[-1]) if weighted else None
    want = rms_norm_reference(x.double(), w.double() if w is not None else None, 1e-6)
    for (got,) in on_every_isa(lambda: (rms_norm(x, w, 1e-6),)):
        assert ((got.double() - want).abs() <= norm_error(shape[-1]) * want.abs() + 1e-44).all()


def test_norm_of_what_is_not_finite() -> None:
    x = torch.ones(4, 40)
    x[1, 3], x[2, 7] = float("nan"), float("inf")
    for (got,) in on_every_isa(lambda: (rms_norm(x, None, 1e-6),)):
        assert got[1].isnan().all()
        assert got[2, 7].isnan() and (got[2, :7] == 0).all()
        assert same_bits(got[0], got[3]) and got[0].isfinite().all()


ROTATED = [((5, 2), 2), ((3, 4, 96), 32), ((1, 1, 24), 8), ((0, 2, 8), 4), ((9, 40), 40)]


@pytest.mark.parametrize(("shape", "turned"), ROTATED)
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_is_near_the_truth(shape: tuple[int, ...], turned: int, inverse: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape)
    turn = rotations(torch.rand(turned // 2), torch.randint(0, 10**6, shape[:1]))
    if len(shape) == 3:
        turn = turn.unsqueeze(1)
    want = rotate_tail_reference(x.double(), turn.to(torch.complex128), inverse)
    pairs = x[..., -turned:].double().abs().unflatten(-1, (-1, 2))
    c, s = turn.real.double().abs(), turn.imag.double().abs()
    parts = [pairs[..., 0] * c + pairs[..., 1] * s, pairs[..., 0] * s + pairs[..., 1] * c]
    for (got,) in on_every_isa(lambda: (rotate_tail(x, turn, inverse),)):
        assert torch.equal(got[..., :-turned], x[..., :-turned])
        error = (got.double() - want).abs()[..., -turned:]
        assert (error <= gamma(2) * torch.stack(parts, dim=-1).flatten(-2)).all()


def test_both_together_are_one_after_the_other() -> None:
    x, w = torch.randn(7, 3, 48), torch.randn(48)
    turn = rotations(torch.rand(8), torch.arange(7)).unsqueeze(1)
    for both, apart in on_every_isa(
        lambda: (norm_and_rotate(x, w, 1e-6, turn), rotate_tail(rms_norm(x, w, 1e-6), turn))
    ):
        assert same_bits(both, apart)


def test_rows_do_not_see_each_other() -> None:
    x, w = torch.randn(600, 4, 96), torch.randn(96)
    turn = rotations(torch.rand(16), torch.arange(600)).unsqueeze(1)
    for (whole,) in on_every_isa(lambda: (norm_and_rotate(x, w, 1e-6, turn),)):
        for row in (0, 7, 599):
            assert same_bits(norm_and_rotate(x[row : row + 1], w, 1e-6, turn[row : row + 1]), whole[row : row + 1])
        gaps = torch.stack([x, x], dim=2)[:, :, 0]
        assert not gaps.is_contiguous()
        assert same_bits(norm_and_rotate(gaps, w, 1e-6, turn), whole)


def test_gradients_and_other_types_take_the_reference() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    rms_norm(x, None, 1e-6).sum().backward()
    assert x.grad is not None
    with forced("reference"):
        want = rms_norm(x.detach().bfloat16(), None, 1e-6)
    assert torch.equal(rms_norm(x.detach().bfloat16(), None, 1e-6), want)
    assert (rms_norm(x.detach(), None, 1e-6) - rms_norm_reference(x.detach(), None, 1e-6)).abs().max() < 40 * UNIT
