"""Drafts change the speed and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.engine.engine import Engine
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampling
from abyssal.model import Transformer
from tests.cases import random_config, random_ids, random_model


@pytest.fixture(scope="module")
def nano() -> Transformer:
    return load_model(bundled_folder()).requires_grad_(False)


def answers(engine: Engine, requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    numbers = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    return [
        (answer.tokens, answer.logprobs) for number in numbers for answer in engine.records[number].answers
    ]


def test_greedy_answers_to_200_prompts_are_identical(nano: Transformer) -> None:
    engine = Engine(nano, budget=1 << 30, slots=16)
    accepted = 0
    for first in range(0, 200, 16):
        prompts = [tuple(random_ids(nano.config, 3 + n % 90, n)) for n in range(first, min(first + 16, 200))]
        want = None
        for drafts in (0, 1 + first % 4):
            requests = [
                Request(prompt=p, max_tokens=12, sampling=Sampling(temperature=0), drafts=drafts) for p in prompts
            ]
            got = answers(engine, requests)
            assert want is None or got == want
            want = got
    accepted = sum(record.accepted for record in engine.records.values())
    drafted = sum(record.drafted for record in engine.records.values())
    assert 0 < accepted < drafted, "both outcomes must have been met"


@pytest.mark.parametrize("drafts", [1, 2, 5, 8])
def test_sampled_answers_are_identical(nano: Transformer, drafts: int) -> None:
    engine = Engine(nano, budget=1 << 30, slots=8)
    for seed in range(3):
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=seed, frequency_penalty=0.3)
        prompt = tuple(random_ids(nano.config, 200, seed))
        plain = Request(prompt=prompt, max_tokens=25, sampling=sampling, n=2)
        drafted = Request(prompt=prompt, max_tokens=25, sampling=sampling, n=2, drafts=drafts)
        assert answers(engine, [plain]) == answers(engine, [drafted])


def test_drafted_tokens_follow_the_distribution_of_plain_sampling() -> None:
    """Chi-square of the second token (the first that can be a draft) over 3,000 seeds, against exact chances.

    Tokens with fewer than 5 expected are pooled; the bound is exceeded by chance once in 10,000 runs.
    """
    config = random_config(3)
    model = random_model(config, 3, torch.float32)
    prompt = (5, 9, 2)
    with torch.inference_mode():
        first = model(torch.tensor([prompt]))[0, -1].double().softmax(-1)
        following = model(torch.tensor([[*prompt, t] for t in range(config.vocab_size)]))[:, -1].double().softmax(-1)
    chances = (first[:, None] * following).sum(0).numpy()
    engine = Engine(model, budget=1 << 28, slots=60, step_tokens=4000)
    tokens, accepted = [], 0
    for start in range(0, 3000, 60):
        requests = [
            Request(prompt=prompt, max_tokens=3, sampling=Sampling(seed=seed), drafts=2)
            for seed in range(start, start + 60)
        ]
        tokens += [answer[0][1] for answer in answers(engine, requests)]
    accepted = sum(record.accepted for record in engine.records.values())
    assert accepted > 30
    seen, want = np.bincount(tokens, minlength=config.vocab_size), 3000 * chances
    rare = want < 5
    seen, want = np.append(seen[~rare], seen[rare].sum()), np.append(want[~rare], want[rare].sum())
    freedom = len(want) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert ((seen - want) ** 2 / np.maximum(want, 1e-9)).sum() < bound


def test_drafts_are_not_made_beyond_the_limit(nano: Transformer) -> None:
    engine = Engine(nano, budget=1 << 28, slots=2)
    (got,) = answers(engine, [Request(prompt=(5, 6, 7), max_tokens=2, sampling=Sampling(temperature=0), drafts=8)])
    assert len(got[0]) == 2
    assert engine.records[0].drafted == 0
