"""The engine against a plain forward of each request alone, without any cache: equal bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.base.errors import CapacityError, ContextError, InputError, TokenError
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.engine import Engine
from abyssal.engine.prefix_cache import POLICIES, Policy, PrefixCache
from abyssal.engine.request import Event, Request
from abyssal.engine.sampler import Sampler, Sampling
from abyssal.model import Transformer
from tests.cases import random_config, random_ids, random_model

SEEDS = range(8)  # every set of layer kinds
GREEDY = Sampling(temperature=0)


def model_of(seed: int, **changes: int) -> Transformer:  # with an MTP block
    return random_model(replace(random_config(seed), **changes), seed, torch.float32)


def budget(model: Transformer, pages: int, slots: int) -> int:
    memory = model.new_memory(pages=0, slots=0)
    return pages * max(memory.page_bytes, 1) + slots * memory.slot_bytes


def engine_of(
    model: Transformer,
    pages: int = 40,
    slots: int = 8,
    step_tokens: int = 96,
    policy: Policy | None = "periodic",
    disk: DiskCache | None = None,
) -> Engine:
    def prefix(memory: object) -> PrefixCache:
        return PrefixCache(memory, "test", policy=policy or "zero", period=256, disk=disk)  # type: ignore[arg-type]

    return Engine(
        model,
        budget=budget(model, pages, slots),
        slots=slots,
        step_tokens=step_tokens,
        prefix=prefix if policy else None,
        token_bytes=lambda token: bytes([97 + token % 26]),
    )


def check_places(engine: Engine) -> None:
    """Every page and slot is held by exactly those who know it."""
    memory = engine.memory
    caches = [run.cache for run in engine._running.values() if run.cache is not None]
    pages = np.zeros(memory.pages.count, np.int64)
    slots = np.zeros(memory.slots.count, np.int64)
    for cache in caches:
        np.add.at(pages, cache.pages, 1)
        slots[cache.slot] += 1
    for node in engine.prefix.nodes() if engine.prefix is not None else ():
        pages[node.page] += 1
    assert (memory.pages.holders == pages).all()
    assert (memory.slots.holders == slots).all()
    assert memory.pages.free == int((pages == 0).sum()) and memory.slots.free == int((slots == 0).sum())


def check_answer(model: Transformer, request: Request, choice: int, tokens: list[int], logprobs: list[float]) -> None:
    """Tokens and log-probabilities are those of one plain pass over prompt and answer, to the bit."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*request.prompt, *tokens]]))[0].double().numpy()
    sampler = Sampler(request.sampling, choice)
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        row = logits[len(request.prompt) - 1 + place]
        assert token == sampler.draw(row, place, request.prompt, tokens[:place])
        shifted = row - row.max()
        assert logprob == float((shifted - np.log(np.exp(shifted).sum()))[token])


def finish(engine: Engine, limit: int = 4000) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
        check_places(engine)
        limit -= 1
        assert limit, "the engine does not come to an end"
    return events


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Random arrivals, cancellations, steps and restarts."""
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("add"), st.integers(0, 2**16)),
                st.tuples(st.just("step"), st.integers(1, 6)),
                st.tuples(st.just("cancel"), st.integers(0, 20)),
                st.tuples(st.just("restart"), st.just(0)),
            ),
            min_size=3,
            max_size=14,
        )
    )


def some_request(model: Transformer, seed: int) -> Request:
    """A prompt that shares a random part of its beginning with others."""
    rng = random.Random(seed)
    vocabulary = model.config.vocab_size
    shared = random_ids(model.config, 420, rng.randrange(2))
    prompt = shared[: rng.choice([0, 5, 128, 140, 256, 300, 384, 420])] + [
        rng.randrange(vocabulary) for _ in range(rng.choice([1, 2, 60, 130]))
    ]
    sampling = rng.choice(
        [
            GREEDY,
            Sampling(seed=seed),
            Sampling(seed=seed, temperature=0.7, top_p=0.8, top_k=20, min_p=0.01),
            Sampling(seed=seed, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
        ]
    )
    return Request(
        prompt=tuple(prompt),
        max_tokens=rng.choice([1, 3, 20, 40]),
        sampling=sampling,
        n=rng.choice([1, 1, 1, 2, 3]),
        drafts=rng.choice([0, 0, 1, 3]),
        stop=(rng.randrange(vocabulary),) if rng.random() < 0.3 else (),
    )


@pytest.mark.parametrize("seed", SEEDS)
@settings(deadline=None, max_examples=6)
@given(traffic(), st.sampled_from([*POLICIES, None]), st.sampled_from([1, 7, 96, 1000]), st.integers(14, 40))
def test_any_traffic_gives_the_answers_of_a_plain_forward(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    steps: list[tuple[str, int]],
    policy: Policy | None,
    step_tokens: int,
    pages: int,
) -> None:
    model = model_of(seed)
    disk = DiskCache(tmp_path_factory.mktemp("prefix"), 1 << 30) if pages % 2 else None
    if step_tokens < 96:
        steps = steps[:6]
    engine = engine_of(model, pages, 4, step_tokens, policy, disk)
    requests: dict[int, Request] = {}
    cancelled: set[int] = set()

    def settle() -> None:
        finish(engine)
        for number, request in requests.items():
            for choice, answer in enumerate(engine.records[number].answers):
                assert answer.finish_reason is not None
                if number not in cancelled:
                    assert answer.finish_reason in ("stop", "length")
                    check_answer(model, request, choice, answer.tokens, answer.logprobs)
        if engine.prefix is not None:
            engine.prefix.clear()
        assert engine.memory.pages.free == engine.memory.pages.count
        assert engine.memory.slots.free == engine.memory.slots.count
        requests.clear()

    for what, value in steps:
        if what == "add":
            request = some_request(model, value)
            requests[engine.add(request)] = request
        elif what == "step":
            for _ in range(value):
                engine.step()
                check_places(engine)
        elif what == "cancel" and value in requests:
            if any(answer.finish_reason is None for answer in engine.records[value].answers):
                cancelled.add(value)
            engine.cancel(value)
            check_places(engine)
        elif what == "restart":
            settle()
            cancelled.clear()
            engine = engine_of(model, pages, 4, step_tokens, policy, disk)
    settle()


def test_answers_that_outgrow_the_memory_are_put_back_and_come_out_the_same() -> None:
    model = model_of(0)
    engine = engine_of(model, pages=7, slots=4, policy="periodic")
    prompts = [random_ids(model.config, 200, n) for n in range(3)]
    requests = [Request(prompt=tuple(p), max_tokens=300, sampling=GREEDY) for p in prompts]
    numbers = [engine.add(request) for request in requests]
    finish(engine)
    assert sum(engine.records[n].preempted for n in numbers) > 0
    for number, request in zip(numbers, requests, strict=True):
        answer = engine.records[number].answers[0]
        assert len(answer.tokens) == 300
        check_answer(model, request, 0, answer.tokens, answer.logprobs)


def test_a_long_prompt_does_not_hold_up_others() -> None:
    """While it is read, an answer that decodes gets a token in every step, and a short prompt its first soon."""
    model = model_of(4)
    engine = engine_of(model, pages=60, step_tokens=64)
    talker = engine.add(Request(prompt=(1, 2, 3), max_tokens=60, sampling=GREEDY))
    engine.step()
    long = engine.add(Request(prompt=tuple(random_ids(model.config, 3000)), max_tokens=2, sampling=GREEDY))
    for _ in range(10):
        events = engine.step()
        assert [e.request for e in events] == [talker]
    assert 0 < engine.records[long].read < 3000
    short = engine.add(Request(prompt=tuple(random_ids(model.config, 40)), max_tokens=1, sampling=GREEDY))
    seen = [e.request for _ in range(3) for e in engine.step()]
    assert short in seen
    finish(engine)


def test_cancelling_frees_at_once_and_harms_nobody() -> None:
    model = model_of(5)
    engine = engine_of(model, policy=None)
    requests = [Request(prompt=tuple(random_ids(model.config, 150, n)), max_tokens=30, sampling=GREEDY) for n in (1, 2)]
    first, second = (engine.add(request) for request in requests)
    for _ in range(6):
        engine.step()
    held = engine.memory.pages.count - engine.memory.pages.free
    (event,) = engine.cancel(first)
    assert event.finish == "cancelled" and engine.memory.pages.count - engine.memory.pages.free < held
    assert not engine.cancel(first) and not engine.cancel(999)
    finish(engine)
    answer = engine.records[second].answers[0]
    check_answer(model, requests[1], 0, answer.tokens, answer.logprobs)


def test_leaving_a_stream_cancels_it() -> None:
    model = model_of(1)
    engine = engine_of(model)
    number, events = engine.stream(Request(prompt=(1, 2), max_tokens=30))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert not engine.busy and engine.records[number].answers[0].finish_reason == "cancelled"


def test_answers_to_one_prompt_read_it_once() -> None:
    model = model_of(0)
    engine = engine_of(model, policy=None)
    request = Request(prompt=tuple(random_ids(model.config, 300)), max_tokens=10, sampling=Sampling(seed=4), n=3)
    number = engine.add(request)
    passes = []
    run = engine.runner.run
    engine.runner.run = lambda caches, ids, **more: passes.append(sum(map(len, ids))) or run(caches, ids, **more)  # type: ignore
    finish(engine)
    assert sum(passes) == 300 + 3 * 9
    answers = engine.records[number].answers
    assert len({tuple(answer.tokens) for answer in answers}) == 3
    for choice, answer in enumerate(answers):
        check_answer(model, request, choice, answer.tokens, answer.logprobs)


def test_max_tokens_is_cut_to_the_context() -> None:
    model = model_of(3, max_position_embeddings=10)
    engine = engine_of(model)
    number, events = engine.stream(Request(prompt=(1,) * 7, max_tokens=100))
    assert len(list(events)) == 3
    assert engine.records[number].answers[0].finish_reason == "length"


def refused(engine: Engine, request: Callable[[], Request], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        engine.add(request())


def test_bad_requests_are_refused_and_others_go_on() -> None:
    config = random_config(3)
    config = replace(
        config, max_position_embeddings=1000, num_nextn_predict_layers=0, compress_ratios=config.backbone_ratios
    )
    model = random_model(config, 3, torch.float32)
    engine = engine_of(model)
    good = Request(prompt=(1, 2, 3), max_tokens=9, sampling=GREEDY)
    number = engine.add(good)
    engine.step()
    top = model.config.vocab_size - 1

    def ask(prompt: tuple[int, ...] = (1,), max_tokens: int = 5, **more: object) -> Callable[[], Request]:
        return lambda: Request(prompt=prompt, max_tokens=max_tokens, **more)  # type: ignore[arg-type]

    refused(engine, ask(()), TokenError, "empty")
    refused(engine, ask((1,) * 1000), ContextError, r"1000 tokens, the context holds 1000")
    refused(engine, ask((-1,)), TokenError, rf"token id -1 .* 0\.\.{top}")
    refused(engine, ask((10**6,)), TokenError, "1000000")
    refused(engine, ask(stop=(10**6,)), TokenError, "stop token id")
    refused(engine, ask(sampling=Sampling(logit_bias={10**6: 1.0})), TokenError, "biased id")
    refused(engine, ask(max_tokens=0), InputError, "max_tokens is 0")
    refused(engine, ask(n=0), InputError, "n is 0")
    refused(engine, ask(top_logprobs=-1), InputError, "top_logprobs")
    refused(engine, ask(drafts=99), InputError, "drafts is 99")
    refused(engine, ask(drafts=1), InputError, "no MTP block")
    refused(engine, ask(stop_strings=("",)), InputError, "empty")
    refused(engine, ask(grammar_after=(1,)), InputError, "without a grammar")
    assert sorted(engine.records) == [number]
    finish(engine)
    answer = engine.records[number].answers[0]
    check_answer(model, good, 0, answer.tokens, answer.logprobs)


def test_a_request_that_can_never_fit_is_refused_with_both_sizes() -> None:
    model = model_of(0)
    engine = engine_of(model, pages=4)
    with pytest.raises(CapacityError, match=r"need 0\.\d+ GB of cache in 1 slots, there are 0\.\d+ GB"):
        engine.add(Request(prompt=(1,) * 300, max_tokens=900))
    with pytest.raises(CapacityError, match="9 slots"):
        engine.add(Request(prompt=(1,), max_tokens=1, n=9))
    with pytest.raises(InputError, match="holds no page"):
        Engine(model, budget=1000)


def test_broken_weights_end_a_request_and_not_the_engine() -> None:
    model = model_of(3)
    model.embed.weight[7] = float("nan")
    engine = engine_of(model)
    bad = engine.add(Request(prompt=(1, 7), max_tokens=5, sampling=GREEDY))
    request = Request(prompt=(1, 2), max_tokens=5, sampling=Sampling(temperature=0, logit_bias={7: -100.0}))
    good = engine.add(request)
    finish(engine)
    answer = engine.records[bad].answers[0]
    assert answer.finish_reason == "failed" and "not finite" in str(answer.error)
    answer = engine.records[good].answers[0]
    assert answer.finish_reason == "length"
    check_answer(model, request, 0, answer.tokens, answer.logprobs)


def test_top_logprobs_are_the_largest() -> None:
    model = model_of(2)
    engine = engine_of(model)
    _, events = engine.stream(Request(prompt=(1, 2, 3), max_tokens=4, sampling=GREEDY, top_logprobs=5))
    for event in events:
        values = [p for _, p in event.top]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert event.top[0] == (event.token, event.logprob)


def test_stop_strings_end_an_answer_across_tokens(tmp_path: Path) -> None:
    """Each token is one letter here; what is before the stop string is counted in bytes."""
    model = model_of(2)
    whole = Request(prompt=(1, 2, 3), max_tokens=12, sampling=Sampling(seed=2))
    engine = engine_of(model)
    number, events = engine.stream(whole)
    text = "".join(chr(97 + e.token % 26) for e in events if e.token is not None)
    wanted = text[4:7]
    number, events = engine.stream(replace(whole, stop_strings=("nowhere!", wanted)))
    got = list(events)
    assert got[-1].finish == "stop" and got[-1].settled == text.index(wanted)
    assert len(engine.records[number].answers[0].tokens) == text.index(wanted) + 3
    number, events = engine.stream(replace(whole, stop_strings=(text[-1] + "zzz",)))
    got = list(events)
    assert got[-1].finish == "length" and got[-1].settled == 12 and (got[-2].settled or 0) <= 11


@pytest.mark.parametrize("pages", [1, 2, 7])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_most_tokens_is_what_is_not_refused(pages: int, n: int) -> None:
    model = model_of(0, max_position_embeddings=600)
    engine = engine_of(model, pages=pages, slots=8)
    for prompt in (1, 100, 127, 128, 129, 255, 256, 300):
        most = engine.most_tokens(prompt, n)
        if most >= 1:
            engine.cancel(engine.add(Request(prompt=(1,) * prompt, max_tokens=most, n=n)))
        if prompt + max(most, 0) < 600:
            with pytest.raises(CapacityError):
                engine.add(Request(prompt=(1,) * prompt, max_tokens=max(most, 0) + 1, n=n))
