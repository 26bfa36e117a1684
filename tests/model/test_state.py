"""Whole, in chunks, token by token, packed with others, and after a rewind: the same result (2.9)."""

from __future__ import annotations

import random

import pytest
import torch

from abyssal.arch.config import ModelConfig
from abyssal.base.errors import TokenError
from abyssal.kvcache import SequenceCache
from abyssal.model import Batch, Transformer
from abyssal.quant.numerics import MODES, Mode, Numerics
from tests.cases import random_config, random_ids, random_model

LENGTHS = (1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 290)


def cut(length: int, seed: int) -> list[int]:
    """Random chunk lengths that add up."""
    rng, parts = random.Random(seed), []
    while length:
        parts.append(min(length, rng.choice([1, 1, 2, 3, 5, 30, 128, 200])))
        length -= parts[-1]
    return parts


def in_chunks(model: Transformer, ids: list[int], lengths: list[int]) -> torch.Tensor:
    cache, first, parts = model.new_cache(), 0, []
    for n in lengths:
        parts.append(model(torch.tensor([ids[first : first + n]]), [cache])[0])
        first += n
    assert cache.position == len(ids)
    return torch.cat(parts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(8))
def test_any_chunking_gives_the_same_logits(seed: int, mode: Mode) -> None:
    config = random_config(seed)
    model = random_model(config, seed, numerics=Numerics.of(mode))
    for length in LENGTHS:
        ids = random_ids(config, length, seed)
        whole = model(torch.tensor([ids]))[0]
        assert torch.equal(in_chunks(model, ids, cut(length, seed)), whole)


@pytest.mark.parametrize("seed", [0, 4, 5])
def test_token_by_token_gives_the_same_logits(seed: int) -> None:
    config = random_config(seed)
    model = random_model(config, seed)
    ids = random_ids(config, 270, seed)
    whole = model(torch.tensor([ids]))[0]
    assert torch.equal(in_chunks(model, ids, [1] * 270), whole)


@pytest.mark.parametrize("seed", range(8))
def test_packed_equals_fake_bit_for_bit(seed: int) -> None:
    config = random_config(seed)
    ids = torch.tensor([random_ids(config, 200, seed)])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        fake = random_model(config, seed, dtype, Numerics.of("fake"))(ids)
        packed = random_model(config, seed, dtype, Numerics.of("packed"))(ids)
        assert torch.equal(fake, packed)
    exact = random_model(config, seed)(ids)
    assert not torch.equal(fake.double(), exact)


@pytest.mark.parametrize("seed", [0, 4, 7])
def test_sequences_of_different_lengths_in_one_pass_do_not_meet(seed: int) -> None:
    """Per-sequence positions and state; no padding (trap 30)."""
    config = random_config(seed)
    model = random_model(config, seed)
    texts = [random_ids(config, n, n) for n in (3, 150, 1, 129, 40)]
    rounds = [(2, 1, 1, 100, 4), (1, 149, 0, 29, 36)]
    memory = model.new_memory()
    caches = [SequenceCache(memory) for _ in texts]
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    for lengths in rounds:
        active = [i for i, n in enumerate(lengths) if n]
        ids = torch.tensor([t for i in active for t in texts[i][done[i] : done[i] + lengths[i]]])
        out = model.run(ids, [caches[i] for i in active], [lengths[i] for i in active])
        for i, rows in zip(active, model.logits(out.z_TD).split([lengths[i] for i in active]), strict=True):
            parts[i].append(rows)
            done[i] += lengths[i]
    for text, rows in zip(texts, parts, strict=True):
        assert torch.equal(torch.cat(rows), model(torch.tensor([text]))[0])


@pytest.mark.parametrize("seed", range(8))
def test_nothing_before_a_changed_token_changes(seed: int) -> None:
    config = random_config(seed)
    model = random_model(config, seed)
    ids = random_ids(config, 262, seed)
    before = model(torch.tensor([ids]))[0]
    for at in (1, 3, 4, 5, 127, 128, 129, 255, 256):
        other = [*ids]
        other[at] = (ids[at] + 1) % config.vocab_size
        after = model(torch.tensor([other]))[0]
        assert torch.equal(after[:at], before[:at])
        assert (after[at] - before[at]).abs().max() > 1e-4


@pytest.mark.parametrize(("seed", "ratio"), [(1, 4), (2, 128)])
def test_a_block_is_first_seen_by_the_token_that_completes_it(seed: int, ratio: int) -> None:
    """Far enough from the block's first token, only a compressed entry can carry it to a query."""
    config = ModelConfig(**{**vars(random_config(seed)), "sliding_window": 1, "index_topk": 64, "num_hidden_layers": 1,
                            "compress_ratios": (ratio, 0), "num_hash_layers": 0})  # fmt: skip
    model = random_model(config, seed)
    ids = random_ids(config, 3 * ratio, 3)
    other = [*ids]
    other[ratio] = (ids[ratio] + 1) % config.vocab_size  # the first token of the second block
    moved = (model(torch.tensor([ids]))[0] - model(torch.tensor([other]))[0]).abs().amax(-1)
    last = 2 * ratio - 1
    assert moved[ratio] > 1e-4
    assert moved[ratio + 1 : last].max() < 1e-12
    assert moved[last] > 1e-6


def test_mtp_reads_four_streams_and_the_next_embedding() -> None:
    config = random_config(0)
    model = random_model(config, 0)
    ids = torch.tensor(random_ids(config, 20))
    cache = model.new_cache()
    streams = model.run(ids, [cache]).streams_TND[:-1]

    def draft(streams: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        return model.logits(model.draft(streams, following, Batch([cache], [19], [0]))[0])

    base = draft(streams, ids[1:])
    other = ids[1:].clone()
    other[-1] = (other[-1] + 1) % config.vocab_size
    assert (draft(streams, other)[-1] - base[-1]).abs().max() > 1e-4
    assert torch.equal(draft(streams, other)[:-1], base[:-1])
    collapsed = streams.mean(1, keepdim=True).expand_as(streams)
    assert (draft(collapsed, ids[1:]) - base).abs().max() > 1e-3


def test_mtp_in_chunks_equals_mtp_at_once() -> None:
    config = random_config(0)
    model = random_model(config, 0)
    ids = torch.tensor(random_ids(config, 60))
    cache = model.new_cache()
    streams = model.run(ids, [cache]).streams_TND[:-1]
    whole, _ = model.draft(streams, ids[1:], Batch([cache], [59], [0]))
    parts = []
    for first, last in ((0, 1), (1, 30), (30, 31), (31, 59)):
        batch = Batch([cache], [last - first], [first])
        parts.append(model.draft(streams[first:last], ids[first + 1 : last + 1], batch)[0])
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bad", [[-1], [0, 10**6], []])
def test_bad_token_ids_are_refused_and_leave_the_state_alone(bad: list[int]) -> None:
    config = random_config(0)
    model = random_model(config, 0)
    cache = model.new_cache()
    with pytest.raises(TokenError):
        model.run(torch.tensor(bad, dtype=torch.long), [cache])
    assert cache.position == 0
