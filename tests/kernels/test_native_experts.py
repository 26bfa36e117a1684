"""Router, activation and expert MLP on every instruction set, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from abyssal.arch.presets import preset
from abyssal.kernels.choice import forced
from abyssal.kernels.experts import experts_reference, fused_experts
from abyssal.kernels.linear import linear
from abyssal.kernels.packed import Packed
from abyssal.kernels.rounding import fake_fp8
from abyssal.kernels.router import router_weights, router_weights_reference, sqrt_softplus
from abyssal.kernels.swiglu import swiglu, swiglu_reference
from abyssal.model.linear import PackedModule
from abyssal.model.moe import MoE
from abyssal.quant.fp4 import quantise_fp4
from abyssal.quant.fp8 import quantise_fp8
from abyssal.quant.numerics import Mode, Numerics
from tests.kernels.native import UNIT, gamma, needs_native, on_every_isa, same_bits

pytestmark = [needs_native, pytest.mark.usefixtures("native_runs")]
EXP = 4 * UNIT  # relative error of exp (vec/exp.hpp)


@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (3, 16, 2), (70, 37, 6), (5, 384, 8)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("biased", [True, False])
def test_router_is_near_the_truth(T: int, E: int, K: int, scale: float, biased: bool) -> None:
    torch.manual_seed(T + E)
    logits = torch.randn(T, E) * scale
    bias = torch.randn(E) if biased else None
    for got, chosen in on_every_isa(lambda: router_weights(logits, bias, None, K, 1.5)):
        assert chosen.shape == (T, K)
        scores = sqrt_softplus(logits.double())
        # exp, log(1 + x), their sum and root; small ones are an exp alone
        ranked = scores if bias is None else scores + bias.double()
        slack = (EXP + gamma(8)) * (scores + ranked.abs()) + 1e-38
        least = (ranked.gather(1, chosen) + slack.gather(1, chosen)).amin(1, keepdim=True)
        rest = (ranked - slack).scatter(1, chosen, -torch.inf)
        assert (rest <= least).all()  # what was left out is not larger, but for rounding
        assert all(len(set(row)) == K for row in chosen.tolist())
        want, _ = router_weights_reference(logits.double(), None, chosen, K, 1.5)
        # weights are quotients of scores, in sums of K; those below float32's normal numbers lose digits
        assert ((got.double() - want).abs() <= (4 * EXP + gamma(K + 24)) * want + 1e-37).all()


def test_router_takes_the_lower_of_equal_experts_and_a_given_choice() -> None:
    logits = torch.zeros(2, 8)
    given = torch.tensor([[3, 3, 1], [7, 0, 2]])
    for _, chosen, weights, same in on_every_isa(
        lambda: (*router_weights(logits, None, None, 3, 1.0), *router_weights(logits, None, given, 3, 1.0))
    ):
        assert chosen.tolist() == [[0, 1, 2], [0, 1, 2]]
        assert torch.equal(same, given)
        assert torch.allclose(weights, torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="given"), torch.inference_mode():
        router_weights(logits, None, given + 5, 3, 1.0)


def test_router_shows_nan() -> None:
    logits = torch.randn(3, 8)
    logits[1, 4] = float("nan")
    for weights, chosen in on_every_isa(lambda: router_weights(logits, None, None, 2, 1.0)):
        assert 4 in chosen[1] and weights[1].isnan().all()
        assert weights[[0, 2]].isfinite().all()


def activation_error(gate: Tensor, want: Tensor) -> Tensor:
    """exp of -gate, a sum, a division and three products."""
    return want.abs() * (EXP + gamma(6)) + 1e-40


@pytest.mark.parametrize("shape", [(1,), (0, 3), (3, 15), (200, 64), (2, 2, 17)])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 60.0])
def test_swiglu_is_near_the_truth(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(3)
    gate, up, gains = torch.randn(shape) * scale, torch.randn(shape) * scale, torch.randn(shape[:-1])
    want = swiglu_reference(gate.double(), up.double(), 10.0, gains.double())
    for (got,) in on_every_isa(lambda: (swiglu(gate, up, 10.0, gains),)):
        assert ((got.double() - want).abs() <= activation_error(gate, want)).all()


def test_swiglu_of_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    gate, up = torch.tensor([[nan, 1, inf, -inf, 1, 1]]), torch.tensor([[1, nan, 1, 1, inf, -inf]])
    for (got,) in on_every_isa(lambda: (swiglu(gate, up, 10.0),)):
        want = swiglu_reference(gate, up, 10.0)
        assert torch.equal(got.isnan(), torch.tensor([[True, True, False, False, False, False]]))
        assert torch.allclose(got[0, 2:], want[0, 2:])


def weights(E: int, D: int, F: int) -> list[Tensor]:
    return [torch.randn(E, F, D) * D**-0.5, torch.randn(E, F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5]


def case(T: int, E: int, K: int, D: int, F: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(T + D)
    chosen = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    return torch.randn(T, D), torch.rand(T, K), chosen, weights(E, D, F), [w[0] for w in weights(1, D, F)]


CASES = [(0, 4, 2, 32, 16), (1, 4, 2, 64, 32), (3, 5, 3, 40, 33), (70, 16, 2, 256, 128), (9, 1, 1, 2, 1)]


@pytest.mark.parametrize(("T", "E", "K", "D", "F"), CASES)
def test_experts_are_near_the_truth(T: int, E: int, K: int, D: int, F: int) -> None:
    x, gains, chosen, routed, shared = case(T, E, K, D, F)
    packed, own = [Packed(w) for w in routed], [Packed(w) for w in shared]
    wide = [w.double() for w in routed], [w.double() for w in shared]
    want = experts_reference(x.double(), gains.double(), chosen, *wide, 10.0)
    bound = torch.zeros_like(want)
    n = gamma(33 + D / 32 + 1)
    for t in range(T):
        sets = [([w[e] for w in wide[0]], float(g)) for e, g in zip(chosen[t].tolist(), gains[t], strict=True)]
        for (w1, w3, w2), gain in [*sets, (wide[1], 1.0)]:
            v = x[t].double()
            g, u = w1 @ v, w3 @ v
            # silu's slope is below 1.1
            a = swiglu_reference(g, u, 10.0) * gain
            g_error, u_error = n * (w1.abs() @ v.abs()), n * (w3.abs() @ v.abs())
            silu = (g.clamp(max=10) * torch.sigmoid(g)).abs()
            a_error = gain * (1.1 * g_error * (u.abs() + u_error) + silu * u_error) + activation_error(g, a)
            bound[t] += w2.abs() @ (a_error + gamma(33 + F / 32 + 1) * (a.abs() + a_error))
        bound[t] += gamma(K + 1) * 4 * (want[t].abs() + bound[t])
    # the parts may cancel: their sizes count in the sums' own rounding
    sizes = experts_reference(x.double(), gains.double(), chosen, *wide, 10.0).abs().amax() if T else 1.0
    for (got,) in on_every_isa(lambda: (fused_experts(x, gains, chosen, packed, own, 10.0, 0),)):  # type: ignore[arg-type, return-value]
        assert ((got.double() - want).abs() <= bound + gamma(K + 1) * 4 * sizes).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8", "float4"])
@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize("T", [1, 2, 5, 60])
def test_fused_experts_are_their_parts_to_the_bit(kind: str, block: int, T: int) -> None:
    E, K, D, F = 6, 3, 256, 128
    x, gains, chosen, routed, shared = case(T, E, K, D, F)

    def stored(w: Tensor) -> tuple[Tensor, Tensor | None]:
        if kind == "float4":
            return quantise_fp4(w)
        if kind == "float8":
            return quantise_fp8(w)
        return (w.bfloat16() if kind == "bfloat16" else w), None

    many, one = [stored(w) for w in routed], [stored(w) for w in shared]
    packed, own = [Packed(*w) for w in many], [Packed(*w) for w in one]

    def rounded(v: Tensor) -> Tensor:
        return fake_fp8(v, block) if block else v

    def expert(v: Tensor, three: list[tuple[Tensor, Tensor | None]], gain: Tensor | None) -> Tensor:
        return linear(rounded(swiglu(linear(v, *three[0]), linear(v, *three[1]), 10.0, gain)), *three[2])

    def one_by_one() -> Tensor:
        y = torch.zeros(T, D)
        for t in range(T):
            v = rounded(x[t : t + 1])
            for place in chosen[t].argsort().tolist():
                e = int(chosen[t, place])
                three = [(w[e], None if s is None else s[e]) for w, s in many]
                y[t] += expert(v, three, gains[t, place : place + 1])[0]
            y[t] += expert(v, one, None)[0]
        return y

    for fused, unpacked in on_every_isa(
        lambda: (
            fused_experts(x, gains, chosen, packed, own, 10.0, block),  # type: ignore[arg-type, return-value]
            fused_experts(x, gains, chosen, many, one, 10.0, block),
        )
    ):
        assert same_bits(fused, one_by_one())
        assert same_bits(fused, unpacked)


def test_no_shared_expert_and_wrong_numbers() -> None:
    x, gains, chosen, routed, _ = case(4, 5, 2, 32, 16)
    packed = [Packed(w) for w in routed]
    with torch.inference_mode():
        got = fused_experts(x, gains, chosen, packed, [], 10.0, 0)
        assert got is not None
        assert torch.allclose(got, experts_reference(x, gains, chosen, routed, [], 10.0), atol=1e-5)
        with pytest.raises(ValueError, match="none"):
            fused_experts(x, gains, chosen + 4, packed, [], 10.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["exact", "fake"])
@torch.inference_mode()
def test_a_packed_moe_runs_on_every_path(dtype: torch.dtype, mode: Mode) -> None:
    """Packing changes no bit, and what is packed is still read where the reference was chosen."""
    torch.manual_seed(1)
    config = dataclasses.replace(
        preset("nano"), hidden_size=64, moe_intermediate_size=32, n_routed_experts=6, num_experts_per_tok=2
    )
    moe = MoE(config, False, Numerics.of(mode)).requires_grad_(False)
    for parameter in moe.parameters():
        parameter.normal_(std=0.2)
    moe = moe.to(dtype)
    x, ids = torch.randn(5, 64, dtype=dtype), torch.zeros(5, dtype=torch.int64)
    before = moe(x, ids, 4)
    for module in moe.modules():
        if isinstance(module, PackedModule):
            module.pack()
    assert moe.experts.packed
    after = moe(x, ids, 4)
    assert torch.equal(before[:4], after[:4])
    with forced("reference"):
        plain = moe(x, ids, 4)
    eps = torch.finfo(dtype).eps
    assert (plain[:4] - after[:4]).abs().max() <= (200 if mode == "exact" else 0.5 / eps) * eps * after.abs().max()
