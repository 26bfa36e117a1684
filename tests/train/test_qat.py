"""Rounded weights are the release's, and their gradients reach the masters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abyssal.arch.presets import preset
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.save import save_model
from abyssal.model import Transformer
from abyssal.quant.numerics import Numerics
from abyssal.train.qat import quantised, released_formats
from tests.cases import random_ids, random_model


def small(mode: str = "exact") -> Transformer:
    """Sizes with whole FP4 groups and partial FP8 tiles, as nano has."""
    config = replace(
        preset("nano"),
        vocab_size=97,
        hidden_size=96,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128, 0),
        q_lora_rank=64,
        o_lora_rank=32,
        index_topk=4,
        n_routed_experts=4,
        moe_intermediate_size=32,
    )
    return random_model(config, 2, torch.float32, Numerics.of(mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["exact", "fake"])
def test_training_sees_the_bits_of_the_exported_release(tmp_path: Path, mode: str) -> None:
    model = small(mode)
    ids = torch.tensor([random_ids(model.config, 150)])
    with quantised(model):
        seen = model(ids)
    plain = model(ids)
    save_model(model.state_dict(), model.config, "flash", tmp_path / "out")
    for keep in (False, True):
        served = load_model(tmp_path / "out", numerics=Numerics.of(mode), keep_stored=keep)  # type: ignore[arg-type]
        assert torch.equal(served(ids), seen)
    assert not torch.equal(plain, seen)


def test_gradients_pass_straight_through_and_masters_come_back() -> None:
    model = small().requires_grad_(True)
    ids = torch.tensor([random_ids(model.config, 40)])
    masters = {n: p.detach().clone() for n, p in model.named_parameters()}
    with quantised(model):
        rounded = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(ids).square().mean().backward()
    assert all(torch.equal(p, masters[n]) for n, p in model.named_parameters())
    changed = {n for n in masters if not torch.equal(masters[n], rounded[n])}
    assert {"layers.1.ffn.experts.w1", "layers.1.attn.wq_b.weight", "embed.weight"} <= changed
    assert "layers.1.attn.attn_sink" not in changed
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # the gradient is that of a model which holds the rounded values
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(rounded[n])
    model.zero_grad()
    model(ids).square().mean().backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(grads[n], p.grad), n


def test_formats_are_chosen_and_failures_give_the_masters_back() -> None:
    model = small()
    masters = {n: p.detach().clone() for n, p in model.named_parameters()}
    with quantised(model, {"fp4"}):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, masters[n])}
        assert changed and all(".ffn.experts." in n for n in changed)
    with quantised(model, ()):
        assert all(torch.equal(p, masters[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), quantised(model):
        raise RuntimeError("stop")
    assert all(torch.equal(p, masters[n]) for n, p in model.named_parameters())
    broken = small()
    broken.layers[2].ffn.experts.w2 = torch.nn.Parameter(torch.ones(4, 96, 33))  # type: ignore[union-attr]
    before = broken.embed.weight.detach().clone()
    with pytest.raises(ValueError, match="32"), quantised(broken):
        pass
    assert torch.equal(broken.embed.weight, before)


def test_every_parameter_has_a_format() -> None:
    model = small()
    specs = released_formats(model)
    assert set(specs) == {n for n, _ in model.named_parameters()}
    assert {specs[n].format for n in specs if ".ffn.experts." in n} == {"fp4"}
    assert specs["layers.1.attn.wo_a.weight"].format == "fp8" and specs["head.weight"].dtype == "BF16"
