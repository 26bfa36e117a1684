"""Reuse of prefixes: how much, why not more, and what is forgotten first. (Equal bits: test_engine.)"""

from __future__ import annotations

import pytest
import torch

from abyssal.base.errors import InputError
from abyssal.engine.engine import Engine
from abyssal.engine.prefix_cache import POLICIES, Policy, PrefixCache
from abyssal.engine.request import PrefixUse, Request
from abyssal.engine.sampler import Sampling
from abyssal.engine.scheduler import Job, Work, plan
from abyssal.engine.stop import StopStrings
from tests.cases import random_config, random_ids, random_model

CONFIG = random_config(0)
MODEL = random_model(CONFIG, 0, torch.float32)
TEXT = random_ids(CONFIG, 3000, 1)


def engine_of(pages: int = 100, policy: Policy = "periodic", period: int = 512) -> Engine:
    tiny = MODEL.new_memory(pages=0, slots=0)
    return Engine(
        MODEL,
        budget=pages * tiny.page_bytes + 4 * tiny.slot_bytes,
        slots=4,
        prefix=lambda memory: PrefixCache(memory, "test", policy=policy, period=period),
    )


def use(engine: Engine, prompt: list[int]) -> PrefixUse:
    number, events = engine.stream(Request(prompt=tuple(prompt), max_tokens=1, sampling=Sampling(temperature=0)))
    list(events)
    return engine.records[number].prefix


def other(token: int) -> int:
    return (token + 1) % CONFIG.vocab_size


def test_reasons_name_the_first_difference() -> None:
    engine = engine_of()
    assert use(engine, TEXT[:1000]) == PrefixUse(0, 0, 1000, "nothing is cached for this model")
    found = use(engine, TEXT[:1000])
    assert (found.hit, found.miss, found.reason) == (896, 104, "the rest is shorter than a page")
    changed = [*TEXT[:500], other(TEXT[500]), *TEXT[501:1000]]
    found = use(engine, changed)
    assert found.hit == 384 and found.reason == "token 500 is the first that differs from what is cached"
    found = use(engine, TEXT[:1300])
    assert found.hit == 896 and found.reason == "new from token 896 on"
    assert use(engine, [other(TEXT[0]), *TEXT[1:600]]).reason.startswith("token 0 is the first")


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 257])
def test_reuse_begins_at_the_first_complete_page_and_leaves_a_token(length: int) -> None:
    engine = engine_of()
    use(engine, TEXT[:length])
    assert use(engine, TEXT[:length]).hit == (length - 1) // 128 * 128


def test_policies_read_again_what_they_have_not_kept() -> None:
    """Section 5.7: full nothing, periodic up to a period, zero a window for each layer, rounded to pages."""
    reach = CONFIG.sliding_window * (CONFIG.num_hidden_layers + 1)
    again: dict[str, int] = {}
    for policy in POLICIES:
        engine = engine_of(policy=policy)
        use(engine, TEXT[:2000])
        again[policy] = use(engine, TEXT[:1153]).recomputed
    assert again["full"] == 0
    assert again["zero"] == -(-reach // 128) * 128
    assert again["periodic"] == min(1152 % 512, again["zero"])
    engine = engine_of(policy="periodic")
    use(engine, TEXT[:2000])
    assert use(engine, TEXT[:2000]).recomputed == 0, "the end of a prompt is kept"


def test_the_oldest_unused_pages_go_first_and_are_remembered_as_evicted() -> None:
    engine = engine_of(pages=20)
    first, second = TEXT[:1000], TEXT[1500:2500]
    use(engine, first)
    use(engine, second)
    use(engine, first)
    use(engine, [other(t) for t in first])
    assert use(engine, first).hit == 896
    found = use(engine, second)
    assert found.hit < 896 and "evicted" in found.reason
    assert engine.prefix is not None
    held = engine.memory.pages.count - engine.memory.pages.free
    assert held == engine.prefix.pages == sum(1 for _ in engine.prefix.nodes())


def test_rings_stay_within_their_budget() -> None:
    memory = MODEL.new_memory()
    cache = PrefixCache(memory, "test", policy="full", rings_budget=3 * memory.slot_bytes)
    engine = engine_of(policy="full")
    engine.prefix = PrefixCache(engine.memory, "test", policy="full", rings_budget=2 * memory.slot_bytes)
    use(engine, TEXT[:2000])
    kept = [node for node in engine.prefix.nodes() if node.rings is not None]
    size = sum(t.numel() * t.element_size() for node in kept for t in node.rings or ())
    assert 0 < size <= 2 * memory.slot_bytes
    assert use(engine, TEXT[:2000]).hit == 1920
    assert cache.pages == 0


def test_unknown_policies_and_periods_are_refused() -> None:
    memory = MODEL.new_memory()
    with pytest.raises(InputError, match="unknown window policy"):
        PrefixCache(memory, "x", policy="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiple of 128"):
        PrefixCache(memory, "x", period=100)


def test_other_weights_share_nothing() -> None:
    """Keys begin with the model's name and layout."""
    roots = {
        PrefixCache(memory, name)._root.key
        for name in ("one", "two")
        for memory in (MODEL.new_memory(), random_model(random_config(1), 1).new_memory())
    }
    assert len(roots) == 4


def test_the_plan_serves_decoders_first_and_prompts_in_turn() -> None:
    jobs = [
        Job(0, left=1, most=1, drafts=2, served=5),
        Job(1, left=900, most=900, drafts=0, served=5),
        Job(2, left=50, most=50, drafts=0, served=3),
        Job(3, left=1, most=1, drafts=0, served=4),
    ]
    assert plan(jobs, 100, 64) == [Work(3, 1), Work(0, 1, 2), Work(2, 50), Work(1, 46)]
    assert plan(jobs, 4, 64) == [Work(3, 1), Work(0, 1, 1), Work(2, 1)]
    assert plan([], 100, 64) == []
    many = [Job(n, 1, 1, 0, n % 3) for n in range(30)]
    assert [w.number for w in plan(many, 10, 64)] == [n for n in range(30) if n % 3 == 0]
    assert plan([Job(0, 10, 3, 0, 0)], 100, 64) == [Work(0, 3)]


def test_stop_strings_hold_back_what_may_begin_one() -> None:
    words = [b"a", b"b", b"ab", b"", "é".encode()[:1], "é".encode()[1:]]
    stops = StopStrings(["bab", "é"], lambda token: words[token])
    settled = []
    for token in (0, 1, 0, 3):
        assert not stops.add(token)
        settled.append(stops.settled)
    assert settled == [1, 1, 1, 1]
    assert stops.add(1) and stops.found == "bab" and stops.settled == 1
    stops = StopStrings(["bab", "é"], lambda token: words[token])
    assert not stops.add(0) and not stops.add(4) and stops.settled == 1
    assert stops.add(5) and stops.found == "é" and stops.settled == 1
    ended = StopStrings(["xy"], lambda _: b"x")
    ended.add(0)
    ended.finish()
    assert ended.settled == 1
