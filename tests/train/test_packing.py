"""Packed documents equal single ones, position skips against the plain forward, and an order that resumes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from abyssal.base.errors import TokenError
from abyssal.kernels.choice import choice, forced
from abyssal.kvcache import SequenceCache
from abyssal.model import Batch
from abyssal.quant.numerics import Numerics
from abyssal.train.order import Cursor, Mixture, Share, Source
from abyssal.train.packing import Pack, Sample, pack, position_skips, with_skips
from tests.cases import random_config, random_ids, random_model
from tests.model.test_against_plain import official
from tests.oracle import plain

LENGTHS = (131, 3, 1, 260, 40, 40)


def samples(config_vocab: int, lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, config_vocab, length + 1).astype(np.uint16)) for length in lengths]


@pytest.mark.parametrize("kernels", ["reference", *choice().supported])
@pytest.mark.parametrize("mode", ["exact", "fake"])
def test_packed_logits_are_those_of_single_documents(kernels: str, mode: str) -> None:
    """To the bit: logits and MTP logits, with all kinds of layers and a sparse selection."""
    config = replace(random_config(0), index_topk=3)
    with forced(kernels):
        model = random_model(config, 1, torch.float32, Numerics.of(mode))  # type: ignore[arg-type]
        documents = samples(config.vocab_size)

        def logits(packed: Pack) -> torch.Tensor:
            out, batch = packed.run(model)
            z, _ = model.draft(out.streams_TND, packed.targets_T, batch)
            return torch.cat([model.logits(out.z_TD), model.logits(z)], dim=-1)

        together = logits(pack(documents)).split(LENGTHS)
        for found, document in zip(together, documents, strict=True):
            assert torch.equal(found, logits(pack([document])))


def test_packed_gradients_are_the_sum_of_single_ones() -> None:
    config = replace(random_config(0), index_topk=3)
    model = random_model(config, 1).requires_grad_(True)
    documents = samples(config.vocab_size)

    def gradients(packs: list[Pack]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for packed in packs:
            model.logits(packed.run(model)[0].z_TD).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together, alone = gradients([pack(documents)]), gradients([pack([d]) for d in documents])
    assert set(together) == set(alone)
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[name], rtol=1e-9, atol=1e-9 * float(alone[name].abs().max()))


def test_a_pack_says_what_to_predict() -> None:
    learned = np.array([False, False, True, True])
    packed = pack([Sample(np.array([5, 6, 7, 8]), learned), Sample(np.array([1, 2]))])
    assert packed.ids_T.tolist() == [5, 6, 7, 1]
    assert packed.targets_T.tolist() == [6, 7, 8, 2]
    assert packed.learned_T.tolist() == [False, True, True, True]
    assert packed.later_T.tolist()[:2] == [7, 8]
    assert packed.later_learned_T.tolist() == [True, True, False, False]
    assert packed.lengths == (3, 1) and packed.tokens == 4
    for bad in ([], [Sample(np.array([1]))]):
        with pytest.raises(TokenError, match="nothing to predict"):
            pack(bad)


class Skipping(plain._Plain):
    """The plain forward, with positions turned further than they stand."""

    skips: np.ndarray

    def rotate(self, x, positions, ratio, inverse=False):  # type: ignore[no-untyped-def]
        return super().rotate(x, positions + self.skips[positions], ratio, inverse)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("topk", [3, 200])
def test_position_skips_turn_further_and_change_nothing_else(mtp: bool, topk: int) -> None:
    """Against the plain forward whose rotations alone know of the skips: windows and blocks go by number."""
    config = replace(random_config(0), index_topk=topk)
    model = random_model(config, 3)
    ids = random_ids(config, 300, 1)
    skips = np.zeros(300, np.int64)
    skips[128:] = 128 * 50
    skips[256:] = 128 * 4000
    oracle = Skipping(asdict(config), official(model), False, None)
    oracle.skips = skips
    expected = oracle.run(ids, mtp)
    tokens = torch.tensor(ids)
    cache = model.new_cache()
    out = model.run(tokens, [cache], skips=[skips])
    if mtp:
        batch = Batch([cache], [299], [0], skips=[skips])
        found = model.logits(model.draft(out.streams_TND[:-1], tokens[1:], batch)[0])
    else:
        found = model.logits(out.z_TD)
    # angles of half a million radians cost float64 ten of its 53 bits more than those of the other tests
    assert float(np.abs(found.numpy() - expected).max()) < 1e-7
    plainly = model.logits(model.run(tokens, [model.new_cache()]).z_TD)
    if not mtp:
        assert torch.equal(plainly[:128], found[:128])
        assert float((plainly[128:] - found[128:]).abs().max()) > 1e-3


@pytest.mark.parametrize("kernels", ["reference", *choice().supported])
def test_skips_in_chunks_and_among_others_give_the_same_bits(kernels: str) -> None:
    config = replace(random_config(0), index_topk=3)
    with forced(kernels):
        model = random_model(config, 3, torch.float32)
        ids = torch.tensor(random_ids(config, 300, 1))
        skips = np.zeros(300, np.int64)
        skips[128:] = 1280
        whole = model.run(ids, [model.new_cache()], skips=[skips]).z_TD
        memory = model.new_memory()
        caches = [SequenceCache(memory), SequenceCache(memory)]
        first = model.run(torch.cat([ids[:131], ids[:7]]), caches, [131, 7], skips=[skips, None]).z_TD
        second = model.run(ids[131:], caches[:1], skips=[skips]).z_TD
        assert torch.equal(torch.cat([first[:131], second]), whole)
        assert torch.equal(first[131:], model.run(ids[:7], [model.new_cache()]).z_TD)


def test_drawn_skips_keep_blocks_whole_and_the_limit() -> None:
    rng = np.random.default_rng(0)
    largest, counts = 0, set()
    for length in (129, 256, 257, 1000, 2048):
        for _ in range(60):
            skips = position_skips(length, 1 << 20, rng)
            assert skips is not None and len(skips) == length and skips[0] == 0
            steps = np.diff(skips)
            cuts = np.flatnonzero(steps) + 1
            assert (steps >= 0).all() and not (cuts % 128).any() and not (skips % 128).any()
            assert 1 <= len(cuts) <= 3
            assert skips[-1] + length <= 1 << 20
            largest = max(largest, int(skips[-1]))
            counts.add(len(cuts))
    assert largest > 1 << 19 and counts == {1, 2, 3}
    assert position_skips(128, 1 << 20, rng) is None and position_skips(500, 500, rng) is None


def test_skips_of_a_pack_depend_on_the_key_alone() -> None:
    packed = pack(samples(50))
    one, two = with_skips(packed, 1 << 20, 0.9, (7, 3)), with_skips(packed, 1 << 20, 0.9, (7, 3))
    other = with_skips(packed, 1 << 20, 0.9, (7, 4))
    texts = [[None if s is None else s.tolist() for s in p.skips] for p in (one, two, other)]
    assert texts[0] == texts[1] != texts[2] and any(texts[0])
    assert with_skips(packed, 1 << 20, 0.0, (7, 3)).skips == (None,) * len(LENGTHS)


class Listed(list[np.ndarray]):
    """Documents in memory."""


def numbered(lengths: list[int]) -> Listed:
    """Documents whose tokens are all different."""
    first = np.cumsum([0, *lengths])
    return Listed(np.arange(a, a + n) for a, n in zip(first, lengths, strict=False))


def pieces(source: Source, count: int) -> list[list[int]]:
    out = []
    for _ in range(count):
        sample, source.cursor = source.peek()
        out.append(sample.ids.tolist())
    return out


def test_an_epoch_reads_every_target_once() -> None:
    documents = numbered([5, 1, 23, 2, 9, 0, 10])
    source = Source(documents, seed=3, length=8)
    orders = []
    for epoch in range(3):
        read: list[int] = []
        order = []
        while source.peek()[1].epoch == epoch:
            sample, source.cursor = source.peek()
            assert 2 <= len(sample.ids) <= 9
            read += sample.ids[1:].tolist()
            order.append(int(sample.ids[0]))
        assert sorted(read) == sorted(t for d in documents for t in d[1:].tolist())
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_a_source_of_nothing_is_refused() -> None:
    for documents in (numbered([1, 0, 1]), numbered([])):
        with pytest.raises(TokenError, match="no document"):
            Source(documents, 0, 8).peek()


def test_masks_are_cut_with_their_documents() -> None:
    document = Sample(np.arange(10), np.arange(10) % 3 == 0)
    source = Source([document], 0, 4)
    found = []
    for _ in range(3):
        sample, source.cursor = source.peek()
        assert sample.learned is not None
        assert (sample.learned == (sample.ids % 3 == 0)).all()
        found.append(sample.ids.tolist())
    assert found == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9]]


def mixture() -> Mixture:
    rng = np.random.default_rng(1)
    texts, codes = (numbered(rng.integers(2, 60, 40).tolist()) for _ in range(2))
    return Mixture({"text": Source(texts, 1, 32), "code": Source(codes, 2, 16)}, {"text": Share(3), "code": Share(1)})


def test_a_mixture_resumes_at_the_very_piece() -> None:
    """From any step, by way of JSON, across epochs."""
    whole = mixture()
    expected, states = [], []
    for _ in range(40):
        states.append(json.dumps(whole.state_dict()))
        expected.append(whole.take(100).ids_T.tolist())
    assert whole.sources["text"].cursor.epoch > 1
    for step in (0, 1, 17, 39):
        resumed = mixture()
        resumed.load_state_dict(json.loads(states[step]))
        assert [resumed.take(100).ids_T.tolist() for _ in range(40 - step)] == expected[step:]


def test_a_mixture_keeps_its_proportions_and_fills_its_passes() -> None:
    mixed = mixture()
    for step in range(60):
        packed = mixed.take(100)
        assert 100 - 32 < packed.tokens <= 100
        total = sum(mixed.tokens.values())
        # nobody is further from its share than the longest piece
        assert abs(mixed.tokens["text"] - 0.75 * total) <= 32, step


def test_sources_start_and_stop() -> None:
    """A source that comes later gets its share from then on, and nothing to make up for the time before."""
    docs = numbered([20] * 50)
    shares = {"early": Share(1, end=2000), "late": Share(3, begin=1000), "all": Share(1)}
    mixed = Mixture({name: Source(docs, place, 19) for place, name in enumerate(shares)}, shares)
    counts: dict[int, dict[str, int]] = {}
    while sum(mixed.tokens.values()) < 3000:
        mixed.take(38)
        counts[sum(mixed.tokens.values())] = dict(mixed.tokens)
    expected = {"early": (0.5, 0.2, 0), "late": (0, 0.6, 0.75), "all": (0.5, 0.2, 0.25)}
    for name, (early, middle, late) in expected.items():
        at = {goal: counts[min(counts, key=lambda t: abs(t - goal))][name] for goal in (1000, 2000, 3000)}
        assert abs(at[1000] - 1000 * early) <= 60
        assert abs(at[2000] - at[1000] - 1000 * middle) <= 60
        assert abs(at[3000] - at[2000] - 1000 * late) <= 60
    ended = Mixture({"a": Source(docs, 0, 19)}, {"a": Share(1, end=30)})
    ended.take(38)
    with pytest.raises(TokenError, match="no source gives any"):
        ended.take(38)


def test_a_mixture_refuses_what_cannot_be() -> None:
    mixed = mixture()
    state = mixed.state_dict()
    state["text"]["seed"] = 9
    with pytest.raises(ValueError, match="seed 9"):
        mixed.load_state_dict(state)
    with pytest.raises(ValueError, match="no share is given for a"):
        Mixture({"a": Source(numbered([50]), 0, 40)}, {})
    with pytest.raises(TokenError, match="does not fit"):
        Mixture({"a": Source(numbered([50]), 0, 40)}, {"a": Share(1)}).take(39)
    assert mixed.sources["text"].cursor == Cursor()
