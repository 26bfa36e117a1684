"""A sublayer in one native call against the same kernels called one by one from Python, bit for bit."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor

from abyssal.kernels import attention, choice
from abyssal.kernels.choice import forced, native
from abyssal.kernels.index_topk import choose_rows
from abyssal.kernels.linear import linear_by_columns
from abyssal.kernels.pool import compress
from abyssal.kernels.rotary import norm_and_rotate, rotate_tail
from abyssal.kernels.rounding import fake_fp4, hadamard
from abyssal.kvcache.memory import CompressedMemory, LayerMemory, Memory
from abyssal.kvcache.sequence import SequenceCache
from abyssal.model import Batch, Transformer
from abyssal.model.block import Block
from abyssal.model.compressor import Compressor
from abyssal.model.mhc import Site
from abyssal.model.rope import Rope
from abyssal.quant.numerics import MODES, Mode, Numerics
from tests.cases import random_config, random_ids, random_model

ISAS = choice.choice().supported
pytestmark = pytest.mark.skipif(not ISAS, reason="no extension")


def advance(
    fast: ModuleType, compressor: Compressor, x_TD: Tensor, batch: Batch, memory: CompressedMemory, rope: Rope
) -> None:
    """A compressor's step; keys are turned before they are stored."""
    entries = compress(
        fast,
        compressor.wkv(x_TD),
        compressor.wgate(x_TD),
        compressor.ape,
        batch.spans_G6,
        (memory.values.data, memory.logits.data, memory.values.size),
        compressor.norm.weight,
        compressor.norm.eps,
        batch.block_turns(compressor.ratio, rope),
        None,
    )
    if len(entries):
        turned = memory.codec.kind == "key" and memory.codec.mode != "exact"
        compressor.store(hadamard(entries) if turned else entries, batch, memory)


def attention_by_single_calls(
    fast: ModuleType, block: Block, streams_TND: Tensor, batch: Batch, memory: LayerMemory, rope: Rope, turn_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The attention sublayer, a call for each kernel, and what the indexer chose."""
    c, a = block.config, block.attn
    H, C, eps = c.num_attention_heads, c.head_dim, c.rms_norm_eps
    site = Site(c, block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale)
    x_TD, gates = site.enter(streams_TND, block.attn_norm)
    latent_TQ = a.q_norm(a.wq_a(x_TD))
    q_THC = a.wq_b(latent_TQ).unflatten(-1, (H, C))
    kv_TC = norm_and_rotate(a.wkv(x_TD), a.kv_norm.weight, eps, turn_T)
    ring, far, chosen = memory.window, None, None
    if a.compressor is not None and memory.compressed is not None:
        advance(fast, a.compressor, x_TD, batch, memory.compressed, rope)
        index, keys = a.indexer, memory.index
        if index is not None and keys is not None:
            advance(fast, index.compressor, x_TD, batch, keys, rope)
            if batch.most_visible(4) > c.index_topk:
                I, J = c.index_n_heads, c.index_head_dim
                q = rotate_tail(index.wq_b(latent_TQ).unflatten(-1, (I, J)), turn_T.unsqueeze(1))
                if index.numerics.index != "exact":
                    q = fake_fp4(hadamard(q))
                weights = index.weights_proj(x_TD) * (J**-0.5 * I**-0.5)
                where = batch.visible_Q(4), batch.firsts, batch.table_GP
                chosen = choose_rows(fast, q, weights, *where, keys.entries, keys.per_page, c.index_topk)
        entries = memory.compressed.entries
        far = attention.Blocks(a.ratio, entries, batch.table_GP, memory.compressed.per_page, chosen)
    near = attention.Window(batch.spans_G6, memory.codec.encode(kv_TC), ring.data, ring.size, c.sliding_window)
    o_THC = attention.attend(fast, q_THC, turn_T, a.attn_sink, eps, near, far)
    o_TGI = o_THC.unflatten(1, (c.o_groups, -1)).flatten(2)
    packed = a.wo_a.packed.get("weight")
    low = linear_by_columns(o_TGI, *((packed, None) if packed is not None else a.wo_a.by_group())).flatten(1)
    return site.leave(a.wo_b(low), streams_TND, gates), chosen


def moe_by_single_calls(block: Block, streams_TND: Tensor, ids_T: Tensor) -> Tensor:
    """The MoE sublayer, a call for each kernel."""
    site = Site(block.config, block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale)
    x_TD, gates = site.enter(streams_TND, block.ffn_norm)
    return site.leave(block.ffn(x_TD, ids_T, len(ids_T)), streams_TND, gates)


def arrays(memory: LayerMemory) -> list[Tensor]:
    return [*(ring.data for ring in memory.rings()), *(c.entries for c in memory.compressors())]


def run(model: Transformer, lengths: list[list[int]]) -> None:
    """Passes over some sequences, each block both ways on memories of their own."""
    fast = native()
    assert fast is not None
    memory: Memory = model.new_memory()
    caches = [SequenceCache(memory) for _ in lengths[0]]
    for number, counts in enumerate(lengths):
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(count)
        batch = Batch(caches, counts)
        batch.watched = [] if number % 2 else None
        g = torch.Generator().manual_seed(number)
        ids_T = torch.tensor(random_ids(model.config, batch.count, number))
        streams = torch.randn(batch.count, model.config.hc_mult, model.config.hidden_size, generator=g)
        for ratio, block, layer in zip(model.config.backbone_ratios, model.layers, memory.layers, strict=True):
            other = copy.deepcopy(layer)
            rope = model.ropes[ratio]
            turn_T = rope.at(batch.positions)
            want, chosen = attention_by_single_calls(fast, block, streams, batch, other, rope, turn_T)
            got = block._steps.attention(streams, batch, layer, rope, turn_T)
            assert got is not None and torch.equal(got, want)
            assert all(torch.equal(a, b) for a, b in zip(arrays(layer), arrays(other), strict=True))
            if batch.watched is not None and ratio == 4:
                last = [span.first + span.length - 1 for span in batch.spans]
                seen = [range(batch.visible(4)[t]) if chosen is None else chosen[t].tolist() for t in last]
                assert [blocks.tolist() for blocks in batch.watched[-1]] == [[b for b in row if b >= 0] for row in seen]
            streams = block._steps.moe(got, ids_T)
            assert streams is not None and torch.equal(streams, moe_by_single_calls(block, want, ids_T))
        for cache, count in zip(caches, counts, strict=True):
            cache.advance(count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_one_call_gives_the_bits_of_many(seed: int, mode: Mode, isa: str) -> None:
    config = random_config(seed)
    model = random_model(config, seed, torch.float32, Numerics.of(mode))
    passes = [[70, 3, 131], [1, 1, 1], [60, 1, 7], [2, 130, 1]]
    with forced(isa), torch.inference_mode():
        run(model, passes)
        run(model.pack(), passes)


def test_weights_that_changed_are_seen() -> None:
    config = random_config(0)
    with forced(ISAS[0]), torch.inference_mode():
        model = random_model(config, 0, torch.float32).pack()
        ids = torch.tensor([random_ids(config, 20)])
        first = model(ids)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids), first)
        state = {name: value * 1.5 for name, value in model.state_dict().items() if "wq_a" in name}
        model.load_state_dict(state, strict=False)
        changed = model(ids)
        assert not torch.equal(changed, first) and torch.equal(model.pack()(ids), changed)
        assert torch.equal(twin(ids), first)


def test_float64_gradients_and_the_reference_take_the_modules() -> None:
    config = random_config(0)
    model = random_model(config, 0, torch.float32)
    block = model.layers[0]
    streams = torch.randn(3, config.hc_mult, config.hidden_size)
    ids = torch.zeros(3, dtype=torch.long)
    with forced(ISAS[0]):
        assert block._steps.moe(streams, ids) is not None
        assert block._steps.moe(streams.double(), ids) is None
        assert block._steps.moe(streams.clone().requires_grad_(), ids) is None
        block.ffn_norm.weight.requires_grad_()
        assert block._steps.moe(streams, ids) is None
        with torch.no_grad():
            assert block._steps.moe(streams, ids) is not None
    with forced("reference"), torch.no_grad():
        assert block._steps.moe(streams, ids) is None


def test_what_does_not_fit_is_refused() -> None:
    config = random_config(0)
    with forced(ISAS[0]), torch.inference_mode():
        model = random_model(config, 0, torch.float32)
        caches = [SequenceCache(model.new_memory())]
        caches[0].reserve(4)
        batch = Batch(caches, [4])
        rope, layer = model.ropes[0], batch.memory.layers[0]
        streams, turn_T = torch.randn(4, config.hc_mult, config.hidden_size), rope.at(batch.positions)
        steps = model.layers[0]._steps
        with pytest.raises(ValueError, match="turn"):
            steps.attention(streams, batch, layer, rope, turn_T[:2])
        batch.spans_G6[0, 4] = 7  # a slot that is not there
        with pytest.raises(ValueError, match="outside"):
            steps.attention(streams, batch, layer, rope, turn_T)
        with pytest.raises(ValueError, match="ids"):
            steps.moe(streams, torch.zeros(3, dtype=torch.long))
