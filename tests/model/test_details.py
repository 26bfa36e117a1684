"""Points of architecture.md that only show in a certain dtype, size or path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import abyssal.kernels.index_topk as index_topk
import abyssal.model.attention as attention
from abyssal.arch.presets import preset
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.save import make_release
from abyssal.kvcache import SequenceCache
from abyssal.model import Transformer
from abyssal.model.init import initialise
from tests.cases import random_config, random_ids, random_model


@pytest.mark.parametrize("seed", [0, 4, 5])
def test_the_size_of_a_step_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 22: keys are gathered and scores are taken step by step; how many at once is a matter of speed."""
    config = random_config(seed)
    model = random_model(config, seed, torch.float32)
    ids = torch.tensor([random_ids(config, 270, seed)])
    want = model(ids)
    monkeypatch.setattr(attention, "KEYS_OF_A_STEP", 1)
    monkeypatch.setattr(index_topk, "QUERIES", 5)
    monkeypatch.setattr(index_topk, "TILE", 64)
    monkeypatch.setattr(index_topk, "DOTS", 1)
    assert torch.equal(model(ids), want)


def test_several_sequences_in_lockstep_gather_their_own_entries() -> None:
    """Trap 10: no query reads what another one chose."""
    config = random_config(5)
    model = random_model(config, 5)
    ids = torch.tensor([random_ids(config, 150, n) for n in range(3)])
    together, memory = model(ids), model.new_memory()
    caches = [SequenceCache(memory) for _ in range(3)]
    stepwise = torch.cat([model(ids[:, :130], caches), *(model(ids[:, i : i + 1], caches) for i in range(130, 150))], 1)
    for n in range(3):
        alone = model(ids[n : n + 1])[0]
        torch.testing.assert_close(together[n], alone, rtol=0, atol=1e-11)
        torch.testing.assert_close(stepwise[n], alone, rtol=0, atol=1e-11)


def test_the_indexer_matters_only_beyond_its_top_k() -> None:
    """Section 2.7: up to 4 * topk + 3 tokens a CSA layer reads every block."""
    config = replace(random_config(1), index_topk=5)
    model = random_model(config, 1)
    other = random_model(config, 1)
    for block in other.layers:
        block.attn.indexer.wq_b.weight.data.neg_()
    ids = torch.tensor([random_ids(config, 40, 1)])
    moved = (model(ids) - other(ids)).abs().amax(-1)[0]
    assert not moved[: 4 * 5 + 3].any()
    assert moved[4 * 5 + 3 :].max() > 1e-3


def test_hash_blocks_choose_by_token_id_alone() -> None:
    config = replace(random_config(0), num_hash_layers=1, num_experts_per_tok=2)
    model = random_model(config, 0)
    gate, scored = model.layers[0].ffn.gate, model.layers[1].ffn.gate
    assert gate.bias is None and scored.tid2eid is None
    ids = torch.tensor(random_ids(config, 30))
    one, two = torch.randn(2, 30, config.hidden_size, dtype=torch.float64)
    assert torch.equal(gate.route(one, ids)[1], gate.tid2eid[ids])
    assert torch.equal(gate.route(one, ids)[1], gate.route(two, ids)[1])
    assert not torch.equal(gate.route(one, ids)[0], gate.route(two, ids)[0])
    assert not torch.equal(scored.route(one, ids)[1], scored.route(two, ids)[1])


def test_a_bfloat16_model_keeps_in_float32_what_the_reference_does(tmp_path: Path) -> None:
    """Traps 12 and 18: ape, sinks, mHC and norms are not rounded, router logits are float32."""
    config = replace(random_config(0), num_hash_layers=1)
    make_release(config, 1, "bf16", tmp_path / "r")
    model = load_model(tmp_path / "r", dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        wide = p.dim() < 2 or name.endswith("ape") or "hc_" in name
        assert p.dtype == (torch.float32 if wide else torch.bfloat16), name
    assert model.layers[1].ffn.gate(torch.randn(2, config.hidden_size).bfloat16()).dtype == torch.float32
    ids = torch.tensor([random_ids(config, 140)])
    assert model(ids).dtype == torch.float32
    exact = load_model(tmp_path / "r", dtype=torch.float64)(ids)
    # bfloat16 has 8 bits; a near-tie in routing or selection can move single tokens further
    assert (model(ids) - exact).abs().median() < 0.05


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 127, 128, 129, 255, 256])
def test_prompts_around_block_edges_go_on_like_longer_ones(length: int) -> None:
    """Trap 13: output broke at a prompt length of exactly 4."""
    config = random_config(0)
    model = random_model(config, 0)
    ids = random_ids(config, length + 6, 2)
    cache = model.new_cache()
    model(torch.tensor([ids[:length]]), [cache])
    rest = torch.cat([model(torch.tensor([[t]]), [cache])[0] for t in ids[length:]])
    torch.testing.assert_close(rest, model(torch.tensor([ids]))[0, length:], rtol=0, atol=1e-11)


def test_a_new_cache_remembers_nothing() -> None:
    """Section 2.9: a prompt shorter than a block on a used model must not see the last conversation."""
    config = random_config(1)
    model = random_model(config, 1)
    first = model(torch.tensor([[1, 2]]))
    model(torch.tensor([random_ids(config, 50)]), [model.new_cache()])
    assert torch.equal(model(torch.tensor([[1, 2]])), first)


def test_cache_sizes_are_those_of_the_calculation() -> None:
    from abyssal.efficiency.kv import kv_cost
    from abyssal.quant.numerics import Numerics

    config = replace(preset("nano"), vocab_size=64)
    model = initialise(Transformer(config, numerics=Numerics.of("packed")), 0).requires_grad_(False)
    cache = model.new_cache()
    model(torch.zeros(1, 512, dtype=torch.long), [cache])
    assert cache.growing_bytes == kv_cost(config).at(512)


def test_starting_values_are_a_plain_residual() -> None:
    """mHC gates start small: streams stay close to copies of the embedding, and logits stay small."""
    config = replace(preset("nano"), vocab_size=64)
    model = initialise(Transformer(config), 0).requires_grad_(False)
    again = initialise(Transformer(config), 0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    ids = torch.arange(64)
    streams = model.run(ids, [model.new_cache()]).streams_TND
    assert (streams - streams.mean(1, keepdim=True)).abs().max() < streams.abs().max()
    assert 0 < model(ids[None]).std() < 2


def test_a_turned_head_is_the_embedding_turned() -> None:
    """Every two ids are as alike in the head as in the embedding, but the head is another matrix."""
    config = replace(preset("nano"), vocab_size=300)
    model = initialise(Transformer(config), 3, embedding_std=1.0, turned_head=True)
    embed_VD, head_VD = model.embed.weight.double(), model.head.weight.double()
    scale = config.initializer_range / embed_VD.std()
    torch.testing.assert_close(head_VD @ head_VD.T, scale**2 * embed_VD @ embed_VD.T, rtol=1e-5, atol=1e-7)
    assert (head_VD - scale * embed_VD).norm() > head_VD.norm()

