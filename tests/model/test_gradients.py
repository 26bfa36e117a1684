"""Gradients of the whole model against finite differences, in float64."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from abyssal.arch.config import ModelConfig
from abyssal.kernels.choice import choice, forced, native
from abyssal.kernels.router import sqrt_softplus
from abyssal.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from abyssal.model import Batch, Transformer
from abyssal.quant.entry import fake_entry
from abyssal.quant.fp4 import fake_fp4
from abyssal.quant.fp8 import fake_fp8
from abyssal.quant.numerics import Mode, Numerics
from tests.cases import random_config, random_ids, random_model

STEP = 1e-6


def loss_of(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    cache = model.new_cache()
    out = model.run(ids[:-2], [cache])
    main = F.cross_entropy(model.logits(out.z_TD), ids[1:-1])
    z_TD, _ = model.draft(out.streams_TND, ids[1:-1], Batch([cache], [len(ids) - 2], [0]))
    draft = model.logits(z_TD)
    return main + 0.3 * F.cross_entropy(draft, ids[2:])


def tiny() -> tuple[ModelConfig, Transformer, torch.Tensor]:
    config = replace(random_config(0), num_hash_layers=1, index_topk=64, swiglu_limit=10.0)
    ids = torch.tensor(random_ids(config, 138, 1))
    return config, random_model(config, 1).requires_grad_(True), ids


def test_every_parameter_against_finite_differences() -> None:
    """Two entries of every parameter; routing and selection are constant over so small a step."""
    _, model, ids = tiny()
    loss_of(model, ids).backward()
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for name, p in model.named_parameters():
        if not p.requires_grad or name.endswith("gate.bias"):
            continue
        if ".indexer." in name:
            assert p.grad is None or not p.grad.any(), "a choice has no gradient"
            continue
        assert p.grad is not None, name
        flat, grad = p.data.view(-1), p.grad.view(-1)
        for place in torch.randint(len(flat), (2,), generator=generator).tolist():
            value = float(flat[place])
            with torch.no_grad():
                flat[place] = value + STEP
                above = loss_of(model, ids)
                flat[place] = value - STEP
                below = loss_of(model, ids)
                flat[place] = value
            numeric = float(above - below) / (2 * STEP)
            # truncation of order STEP^2 and rounding of order 1e-16 / STEP
            assert abs(numeric - float(grad[place])) <= 1e-7 + 1e-5 * abs(numeric), (name, place)
            checked += 1
    assert checked > 150


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sinkhorn_gradient_is_that_of_the_reference(size: int) -> None:
    x = torch.randn(7, size, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 20, 1e-6), (x,))
    weight = torch.randn(7, size, size, dtype=torch.float64)
    (ours,) = torch.autograd.grad((sinkhorn(x, 20, 1e-6) * weight).sum(), x)
    (plain,) = torch.autograd.grad((sinkhorn_reference(x, 20, 1e-6) * weight).sum(), x)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


def test_router_scores_have_finite_gradients_everywhere() -> None:
    x = torch.tensor([-300.0, -200.0, -16.7, -15.0, -14.9, 0.0, 50.0, 200.0], requires_grad=True)
    sqrt_softplus(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("rounding", [lambda x: fake_fp8(x, 64), fake_fp4, lambda x: fake_entry(x, 32)])
def test_roundings_pass_the_gradient_straight_through(rounding: object) -> None:
    assert callable(rounding)
    x = torch.randn(3, 96, requires_grad=True)
    out = rounding(x)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert not torch.equal(out, x)


def test_gradients_flow_through_cached_chunks() -> None:
    """The loss of two chunks has the gradient of one pass: state is not cut off."""
    config, model, _ = tiny()
    ids = torch.tensor([random_ids(config, 140, 2)])
    model(ids)[0, -1].sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = model.new_cache()
    model(ids[:, :130], [cache])
    model(ids[:, 130:], [cache])[0, -1].sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-8, atol=1e-10)


def test_backward_passes_leave_no_tensors_behind() -> None:
    """A graph node that holds its own output keeps every step's activations alive."""

    def tensors() -> int:
        gc.collect()
        return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    _, model, ids = tiny()
    loss_of(model, ids).backward()
    before = tensors()
    for _ in range(3):
        loss_of(model, ids).backward()
    assert tensors() <= before


@pytest.mark.skipif(not choice().supported, reason="the extension was not built")
@pytest.mark.parametrize("mode", ["exact", "fake", "packed"])
def test_a_trainer_sees_the_numbers_of_a_rollout(mode: Mode) -> None:
    """The native kernels give the same bits with gradients and without, in one pass and in chunks."""
    config, double, ids = tiny()
    config = replace(config, index_topk=8)
    with forced(choice().supported[0]):
        model = Transformer(config, numerics=Numerics.of(mode))
        model.load_state_dict(double.state_dict())
        model.requires_grad_(True)
        logits = model(ids[None])
        with torch.inference_mode():
            assert torch.equal(model(ids[None]), logits)
        cache = model.new_cache()
        parts = [model(part[None], [cache]) for part in ids.split([70, 9, 1, len(ids) - 80])]
        assert torch.equal(torch.cat(parts, dim=1), logits)


@pytest.mark.skipif(not choice().supported, reason="the extension was not built")
def test_native_gradients_are_near_those_in_float64() -> None:
    """As near as the reference's in float32, whole and in chunks; and the same bits on one thread and on several."""
    config, double, ids = tiny()
    model = Transformer(config)
    model.load_state_dict(double.state_dict())
    model.requires_grad_(True)

    def gradients(model: Transformer, parts: list[int]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        cache = model.new_cache()
        logits = torch.cat([model(part[None], [cache])[0] for part in ids.split(parts)])
        F.cross_entropy(logits[:-1], ids[1:]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    def distance(found: dict[str, torch.Tensor]) -> float:
        assert found.keys() == truth.keys()
        return max(float((found[n].double() - x).norm() / x.norm()) for n, x in truth.items())

    truth = gradients(double, [len(ids)])
    with forced("reference"):
        limit = distance(gradients(model, [len(ids)]))
    with forced(choice().supported[0]):
        whole = gradients(model, [len(ids)])
        assert distance(whole) <= 4 * limit < 1e-3
        assert distance(gradients(model, [70, 9, 1, len(ids) - 80])) <= 4 * limit
        module = native()
        assert module is not None
        threads = module.threads()
        module.set_threads(3)
        again = gradients(model, [len(ids)])
        module.set_threads(threads)
        assert all(torch.equal(again[name], x) for name, x in whole.items())


def test_inference_first_does_not_spoil_training() -> None:
    """Nothing made under inference mode may be kept and meet a gradient later."""
    _, model, ids = tiny()
    with torch.inference_mode():
        model(ids[None])
    loss_of(model, ids).backward()
    assert model.embed.weight.grad is not None
