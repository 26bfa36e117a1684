"""What a request may ask to be told or to have closed: prompt scores, chosen blocks, a limit to its thinking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abyssal.base.errors import InputError
from abyssal.engine.engine import Engine
from abyssal.engine.request import Event, Request
from abyssal.engine.sampler import Sampling
from abyssal.kernels.choice import forced
from abyssal.model import Transformer
from abyssal.model.indexer import Indexer
from tests.cases import random_ids
from tests.engine.test_engine import check_answer, check_places, engine_of, finish, model_of


def answer_of(engine: Engine, request: Request) -> tuple[int, list[Event]]:
    number, events = engine.stream(request)
    return number, list(events)


def plain_logprobs(model: Transformer, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].double().log_softmax(-1).numpy()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_prompt_scores_are_those_of_a_plain_forward(length: int) -> None:
    model = model_of(0)
    engine = engine_of(model)
    prompt = random_ids(model.config, length)
    other = engine.add(Request(prompt=tuple(random_ids(model.config, 70)), max_tokens=30))
    for _ in range(2):  # the second finds the first in the prefix cache, and must not use it
        number, _ = answer_of(engine, Request(prompt=tuple(prompt), max_tokens=2, score_prompt=True, top_logprobs=3))
        scores = engine.records[number].scores
        want = plain_logprobs(model, list(prompt))
        assert len(scores) == length and scores[0] is None
        assert engine.records[number].prefix.hit == 0
        for place, score in enumerate(scores[1:], 1):
            assert score is not None and score.token == prompt[place]
            # log_softmax and ours differ in the order of one sum
            assert abs(score.logprob - want[place - 1, score.token]) < 1e-12
            best = np.argsort(-want[place - 1], kind="stable")[:3]
            assert [token for token, _ in score.top] == best.tolist()
    finish(engine)
    assert engine.records[other].answers[0].finish_reason == "length"
    check_places(engine)


def test_chosen_blocks_are_what_the_indexer_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the rows that attention reads, decoded back through the page table, beside other requests.

    Of the plain path; tests/model/test_steps.py has the native one.
    """
    model = model_of(0, index_topk=3)
    layers = sum(ratio == 4 for ratio in model.config.backbone_ratios)
    assert layers
    engine = engine_of(model)
    real = Indexer.rows
    seen: list[tuple[int, int, set[int]]] = []
    want: dict[int, list[set[int]]] = {}

    def rows(self: Indexer, latent, x, turn, batch, memory):  # type: ignore[no-untyped-def]
        found = real(self, latent, x, turn, batch, memory)
        for span in batch.spans:
            last = span.first + span.length - 1
            blocks = np.arange((span.start + span.length) // 4)
            numbers = {row: int(block) for row, block in zip(span.cache.block_rows(blocks, 4), blocks, strict=True)}
            picked = {numbers[int(row)] for row, there in zip(*(x[last] for x in found), strict=True) if there}
            seen.append((span.start + span.length, id(span.cache), picked))
        return found

    monkeypatch.setattr(Indexer, "rows", rows)
    with forced("reference"):
        other = engine.add(Request(prompt=tuple(random_ids(model.config, 90, 5)), max_tokens=40))
        prompt = tuple(random_ids(model.config, 37))
        number, events = engine.stream(Request(prompt=prompt, max_tokens=12, trace=True))
        mine = None
        for count, event in enumerate(events):
            if mine is None:
                mine = next(id(run.cache) for run in engine._running.values() if run.request_number == number)
            position = len(prompt) + count
            want[position] = [picked for at, cache, picked in seen if (at, cache) == (position, mine)]
            assert [set(blocks) for blocks in event.blocks] == want[position]
            assert len(event.blocks) == layers
            assert all(len(blocks) == min(position // 4, 3) for blocks in event.blocks)
            assert all(list(blocks) == sorted(blocks) for blocks in event.blocks)
        assert len(want) == 12
        finish(engine)
        assert not any(event.blocks for event in answer_of(engine, Request(prompt=prompt, max_tokens=2))[1])
    assert engine.records[other].answers[0].finish_reason == "length"


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("drafts", [0, 3])
def test_an_answer_is_closed_after_so_many_tokens(count: int, drafts: int) -> None:
    model = model_of(0)
    engine = engine_of(model)
    prompt = tuple(random_ids(model.config, 20))
    free, _ = answer_of(engine, Request(prompt=prompt, max_tokens=20, sampling=Sampling(seed=3)))
    unbound = engine.records[free].answers[0].tokens
    closer = next(token for token in range(model.config.vocab_size) if token not in unbound)
    number, _ = answer_of(
        engine,
        Request(prompt=prompt, max_tokens=20, sampling=Sampling(seed=3), close=(closer, count), drafts=drafts),
    )
    tokens = engine.records[number].answers[0].tokens
    assert tokens[: count + 1] == [*unbound[:count], closer]
    assert tokens.count(closer) == 1 and len(tokens) == 20
    present = unbound[1]
    number, _ = answer_of(
        engine, Request(prompt=prompt, max_tokens=20, sampling=Sampling(seed=3), close=(present, 5), drafts=drafts)
    )
    assert engine.records[number].answers[0].tokens == unbound, "it had come by itself"
    check_answer(model, Request(prompt=prompt, max_tokens=20, sampling=Sampling(seed=3)), 0, unbound,
                 engine.records[free].answers[0].logprobs)  # fmt: skip


def test_bad_limits() -> None:
    with pytest.raises(InputError, match="close holds -1"):
        Request(prompt=(1,), max_tokens=1, close=(0, -1))
