"""The whole model, MTP and the simulated quantisation against the plain NumPy forward; and the traps.

transformers lacks MTP, Hadamard, FP4 and FP8 simulation. Each trap of architecture.md 6 that this code could
fall into has a deliberately broken variant; the test of its name shows that the comparison would notice it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from abyssal.arch.config import ModelConfig
from abyssal.model import Batch, Transformer
from abyssal.quant.numerics import Numerics
from tests.cases import random_config, random_ids, random_model
from tests.oracle import plain

TOLERANCE = 1e-9


def official(model: Transformer) -> dict[str, np.ndarray]:
    """The state under the checkpoint's names: experts one by one."""
    out = {}
    for name, tensor in model.state_dict().items():
        head, routed, part = name.partition(".ffn.experts.")
        if routed:
            for number, weight in enumerate(tensor):
                out[f"{head}{routed}{number}.{part}.weight"] = weight.double().numpy()
        else:
            out[name] = tensor.double().numpy()
    return out


def ours(model: Transformer, ids: list[int], mtp: bool) -> np.ndarray:
    if not mtp:
        return model(torch.tensor([ids]))[0].numpy()
    tokens = torch.tensor(ids)
    cache = model.new_cache()
    streams = model.run(tokens, [cache]).streams_TND[:-1]
    z, _ = model.draft(streams, tokens[1:], Batch([cache], [len(ids) - 1], [0]))
    return model.logits(z).numpy()


def trap_case() -> tuple[ModelConfig, Transformer, list[int]]:
    """All layer kinds, logits that reach the clamp, routing far from the middle, and a far-off position."""
    config = replace(random_config(0), index_topk=3, sliding_window=8, swiglu_limit=0.5, hc_mult=4, num_hash_layers=1,
                     num_experts_per_tok=2)  # fmt: skip
    model = random_model(config, 5, numerics=Numerics.of("fake"))
    for block in model.layers:
        gate = block.ffn.gate
        gate.weight.data *= 12  # some scores fall below -16.6, where log(1 + exp(x)) is 0 in float32
        block.hc_attn_scale.data += 2
        block.hc_ffn_scale.data += 2
    return config, model, random_ids(config, 150, 5)


@pytest.mark.parametrize("mode", ["exact", "fake"])
@pytest.mark.parametrize("seed", range(8))
def test_logits_and_mtp(seed: int, mode: str) -> None:
    config = random_config(seed)
    model = random_model(config, seed, numerics=Numerics.of(mode))  # type: ignore[arg-type]
    ids = random_ids(config, (140, 60, 260, 40, 150, 133, 50, 45)[seed], seed)
    weights = official(model)
    for mtp in (False, True):
        want = plain.forward(config.to_dict(), weights, ids, mode, mtp)
        assert want.std() > 0.5
        np.testing.assert_allclose(ours(model, ids, mtp), want, rtol=0, atol=TOLERANCE)


def test_the_right_forward_matches_on_the_trap_case() -> None:
    config, model, ids = trap_case()
    want = plain.forward(config.to_dict(), official(model), ids, "fake")
    np.testing.assert_allclose(ours(model, ids, False), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("trap", plain.BROKEN)
def test_trap(trap: str) -> None:
    """A forward with this one mistake is told apart from ours."""
    config, model, ids = trap_case()
    mtp = trap == "mtp_collapsed"
    with np.errstate(all="ignore"):
        wrong = plain.forward(config.to_dict(), official(model), ids, "fake", mtp, broken=trap)
    difference = np.abs(np.nan_to_num(wrong, nan=1e3) - ours(model, ids, mtp)).max()
    assert difference > 1e-4, f"{trap} changes logits by {difference:.1e} only: this case does not exercise it"
