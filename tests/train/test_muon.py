"""Muon and AdamW against torch's, the singular values, and who takes which parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from abyssal.arch.presets import preset
from abyssal.model import Transformer
from abyssal.model.init import initialise
from abyssal.train import muon
from abyssal.train.adamw import AdamW, AdamWRule
from abyssal.train.muon import Muon, MuonRule, orthogonalise
from abyssal.train.optimiser import Optimiser, Rates, parts_of, takes_adamw
from tests.cases import random_config

TRIPLE = (3.4445, -4.7750, 2.0315)


def matrix_with(singular: torch.Tensor, n: int, m: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(n, m)
    u = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    return (u @ torch.diag(singular.double()) @ v.T).float()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (64, 64), (33, 70), (70, 33), (24, 1024), (128, 256)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_become_one(shape: tuple[int, int], scale: float) -> None:
    """From 1e-4 of the largest on, as the specification asks; for gradients of any size."""
    k = min(shape)
    singular = torch.logspace(-4, 0, k) if k > 1 else torch.ones(1)
    # the largest comes first after the norm: all others share it, so a wide spectrum is the hard case
    x = matrix_with(singular * scale, *shape, seed=k)
    values = torch.linalg.svdvals(orthogonalise(x).double())
    # the norm's 1e-7 shifts nothing that the iteration does not mend
    assert float(values.min()) >= 0.99 and float(values.max()) <= 1.01


def test_orthogonal_means_the_singular_vectors_stay() -> None:
    x = matrix_with(torch.linspace(0.05, 1, 32), 32, 48, seed=1)
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert torch.dist(orthogonalise(x).double(), u @ v) / 32**0.5 < 0.005


def test_a_stack_is_its_matrices_one_by_one_and_zero_stays_zero() -> None:
    stack = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(0))
    stack[3] = 0
    together = orthogonalise(stack)
    for one, x in zip(together, stack, strict=True):
        torch.testing.assert_close(one, orthogonalise(x), rtol=0, atol=2e-6)
    assert not together[3].any() and together.isfinite().all()
    assert orthogonalise(stack[:0]).shape == (0, 24, 40)


def test_a_large_stack_is_cut_and_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(7, 24, 40, generator=torch.Generator().manual_seed(0))
    whole = orthogonalise(stack)
    monkeypatch.setattr(muon, "CACHED", 2 * 24 * 40 + 1)
    torch.testing.assert_close(orthogonalise(stack), whole, rtol=0, atol=2e-6)
    monkeypatch.setattr(muon, "CACHED", 1)
    torch.testing.assert_close(orthogonalise(stack.mT), whole.mT, rtol=0, atol=2e-6)


def test_update_has_the_promised_size() -> None:
    """RMS of a square matrix's update is 0.18; of n x m it is 0.18 too, since the factor holds max(n, m)."""
    for shape in ((96, 96), (48, 200), (200, 48)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        rms = Muon({"w": p}).step(1.0)
        assert abs(float(p.detach().square().mean().sqrt()) / 0.18 - 1) < 0.05
        assert abs(rms / 0.18 - 1) < 0.05


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32)])
def test_muon_is_torchs_under_its_coefficients(shape: tuple[int, int]) -> None:
    """One triple, five steps, torch's factor 0.2 and its bfloat16 products."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon({"w": ours}, rule=MuonRule(rms=0.2, steps=(TRIPLE,) * 5, dtype=torch.bfloat16))
    oracle = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    moved = 0.0
    for seed in range(4):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        before = theirs.detach().clone()
        mine.step(0.02)
        oracle.step()
        moved += float(torch.dist(theirs.detach(), before))
    # bfloat16 keeps 8 bits: 5 steps of 3 products, each of which grows an error by at most 3.4445 / 2 on average
    assert float(torch.dist(ours.detach(), theirs.detach())) < 0.03 * moved
    assert moved > 0.1


def test_float32_agrees_with_an_exact_polynomial() -> None:
    """The same polynomial on the singular values, in float64: no step, coefficient or transposition is wrong."""
    x = torch.randn(20, 31, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (x.norm() + 1e-7)
    for a, b, c in [TRIPLE] * 8 + [(2.0, -1.5, 0.5)] * 2:
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag(s) @ v
    torch.testing.assert_close(orthogonalise(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(orthogonalise(x.mT), expected.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(orthogonalise(x.float()).double(), expected, rtol=0, atol=2e-5)


def test_parts_and_stacks_are_independent_matrices() -> None:
    """A stack, a matrix in parts and single matrices get the same update."""
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 3, 16, 24, generator=generator)
    single = {str(i): nn.Parameter(start[i].clone()) for i in range(3)}
    stacked, parted = nn.Parameter(start.clone()), nn.Parameter(start.flatten(0, 1).clone())
    for i in range(3):
        single[str(i)].grad = grad[i].clone()
    stacked.grad, parted.grad = grad.clone(), grad.flatten(0, 1).clone()
    Muon(single).step(0.1)
    Muon({"w": stacked}).step(0.1)
    Muon({"w": parted}, {"w": 3}).step(0.1)
    for i in range(3):
        torch.testing.assert_close(stacked[i], single[str(i)], rtol=0, atol=1e-6)
    torch.testing.assert_close(parted, stacked.flatten(0, 1), rtol=0, atol=1e-6)
    whole = nn.Parameter(start.flatten(0, 1).clone())
    whole.grad = grad.flatten(0, 1).clone()
    Muon({"w": whole}).step(0.1)
    assert not torch.allclose(whole, parted, atol=1e-3)


def test_parameters_without_gradients_stand_still() -> None:
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    assert Muon({"p": p}).step(0.1) == 0.0 and AdamW({"q": q}).step(0.1) == 0.0
    assert torch.equal(p, torch.ones(4, 4)) and torch.equal(q, torch.ones(4))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="sink"):
        Muon({"sink": nn.Parameter(torch.zeros(4))})
    with pytest.raises(ValueError, match="parts"):
        Muon({"w": nn.Parameter(torch.zeros(5, 4))}, {"w": 2})


def test_a_parameter_may_have_a_rate_of_its_own() -> None:
    def after(rate: float, own: dict[str, float]) -> dict[str, torch.Tensor]:
        params = {name: nn.Parameter(torch.arange(4.0)) for name in "ab"}
        adamw = AdamW(params)
        for step in range(3):
            for p in params.values():
                p.grad = torch.tensor([1.0, -2.0, 0.5, step])
            adamw.step(rate, own)
        return {name: p.detach() for name, p in params.items()}

    mixed, slow, fast = after(0.1, {"b": 0.3}), after(0.1, {}), after(0.3, {})
    assert torch.equal(mixed["a"], slow["a"])
    assert torch.equal(mixed["b"], fast["b"])
    assert not torch.equal(slow["b"], fast["b"])


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = AdamW({"w": ours}, AdamWRule(eps=1e-8, decay=0.1))
    oracle = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for i in range(6):
        grad = torch.randn(7, 9, generator=generator, dtype=torch.float64) * 10.0 ** -(2 * i)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step(0.01)
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_state_is_float32_for_narrow_parameters_and_survives_a_save() -> None:
    p = nn.Parameter(torch.randn(8, 8).bfloat16())
    q = nn.Parameter(torch.randn(8).bfloat16())
    p.grad, q.grad = torch.randn(8, 8).bfloat16(), torch.randn(8).bfloat16()
    mine, adamw = Muon({"p": p}), AdamW({"q": q})
    mine.step(0.1)
    adamw.step(0.1)
    assert mine.momentum["p"].dtype == adamw.first["q"].dtype == adamw.second["q"].dtype == torch.float32
    states = {k: v.clone() for k, v in (mine.state_dict() | adamw.state_dict()).items()}
    assert set(states) == {"p.momentum", "q.first", "q.second", "q.steps"}
    other, another = Muon({"p": nn.Parameter(p.detach().clone())}), AdamW({"q": nn.Parameter(q.detach().clone())})
    other.load_state_dict(states)
    another.load_state_dict(states)
    for a, b in ((mine, other), (adamw, another)):
        for ours, theirs in zip(a.params.values(), b.params.values(), strict=True):
            theirs.grad = ours.grad
        a.step(0.1)
        b.step(0.1)
    assert torch.equal(p, other.params["p"]) and torch.equal(q, another.params["q"])
    with pytest.raises(KeyError):
        other.load_state_dict({})


def test_nano_is_divided_as_the_specification_says() -> None:
    with torch.device("meta"):
        model = Transformer(preset("nano"))
    optimiser = Optimiser(model)
    adamw, matrices = set(optimiser.adamw.params), set(optimiser.muon.params)
    assert adamw | matrices == {n for n, p in model.named_parameters() if not n.endswith("gate.bias")}
    assert not adamw & matrices
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.1.attn.q_norm.weight",
        "layers.2.attn.attn_sink",
    ):
        assert name in adamw
    for leaf in ("hc_attn_base", "hc_ffn_scale", "hc_attn_fn", "ffn.gate.weight", "attn.compressor.ape"):
        assert f"layers.1.{leaf}" in adamw
    for leaf in ("ffn.experts.w1", "attn.wq_b.weight", "attn.wo_a.weight", "attn.indexer.weights_proj.weight"):
        assert f"layers.1.{leaf}" in matrices
    assert "mtp.0.e_proj.weight" in matrices
    assert optimiser.muon.parts["layers.1.attn.wo_a.weight"] == 4
    assert optimiser.muon.parts["layers.1.attn.compressor.wkv.weight"] == 2
    assert optimiser.muon.parts["layers.1.attn.indexer.compressor.wgate.weight"] == 2
    assert optimiser.muon.parts["layers.2.attn.compressor.wkv.weight"] == 1
    assert "layers.0.ffn.shared_experts.w1.weight" not in parts_of(model)


def test_large_models_give_router_and_mixes_to_muon() -> None:
    matrix = torch.zeros(24, 64)
    for name in ("layers.0.hc_attn_fn", "layers.0.ffn.gate.weight", "layers.1.attn.compressor.ape"):
        assert takes_adamw(name, matrix, small=True) and not takes_adamw(name, matrix, small=False)
    assert takes_adamw("embed.weight", matrix, small=False)


def test_adamw_takes_matrices_where_muon_shall_not() -> None:
    model = initialise(Transformer(random_config(0)), 0)
    optimiser = Optimiser(model, matrices=False)
    assert not optimiser.muon.params and not optimiser.muon.state_dict()
    assert set(optimiser.adamw.params) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_one_step_changes_all_that_has_a_gradient() -> None:
    model = initialise(Transformer(replace(random_config(0), num_hash_layers=1)), 0)
    optimiser = Optimiser(model)
    ids = torch.arange(40) % model.config.vocab_size
    model(ids[None]).logsumexp(-1).sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rms = optimiser.step(Rates(0.02, 0.003))
    assert rms["muon"] > 0.01 and rms["adamw"] > 0.1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (p.grad is None), name
