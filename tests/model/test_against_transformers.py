"""Logits equal transformers' on the same random weights, over all layer kinds and block edges."""

from __future__ import annotations

import pytest
import torch

from abyssal.model import Transformer
from tests.cases import random_config, random_ids, random_model
from tests.oracle import hf

EDGES = (1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 300)  # 300 is far beyond 4 * index_topk, at most 32 tokens


def rotary(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Our tables of window-only and compressed layers."""
    compressed = [rope for ratio, rope in model.ropes.items() if ratio]
    return model.ropes[0].frequencies, (compressed or [model.ropes[0]])[0].frequencies


@pytest.mark.parametrize("at", [1, 3, 4, 5, 127, 128, 129, 255, 256])
def test_the_installed_transformers_sees_no_future(at: int) -> None:
    """5.8.0 let queries read compressed entries of their future; such an oracle would prove nothing."""
    config = random_config(0)
    model = hf.build(config.to_dict(), random_model(config, 0).state_dict(), torch.float64)
    ids = random_ids(config, 280)
    other = [*ids]
    other[at] = (ids[at] + 1) % config.vocab_size
    one, two = hf.logits(model, ids), hf.logits(model, other)
    # other routing changes the size of expert batches, and with it the last bit of a product
    assert (one[:at] - two[:at]).abs().max() < 1e-10
    assert (one[at:] - two[at:]).abs().max() > 1e-4


@pytest.mark.parametrize("seed", range(24))
def test_logits_in_float64_and_float32(seed: int) -> None:
    """At least 20 configurations: 1e-9 in float64 with our rotary table, 1e-4 in float32 with its own."""
    config = random_config(seed)
    model, narrow = random_model(config, seed), random_model(config, seed, torch.float32)
    exact = hf.build(config.to_dict(), model.state_dict(), torch.float64, rotary(model))
    single = hf.build(config.to_dict(), model.state_dict(), torch.float32)
    for length in EDGES if seed < 8 else EDGES[seed % 3 :: 3]:
        ids = random_ids(config, length, seed)
        ours, theirs = model(torch.tensor([ids]))[0], hf.logits(exact, ids)
        assert theirs.std() > 0.5
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        torch.testing.assert_close(narrow(torch.tensor([ids]))[0], hf.logits(single, ids), rtol=0, atol=1e-4)
