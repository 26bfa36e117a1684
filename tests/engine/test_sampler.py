"""The sampler against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.base.errors import InputError
from abyssal.engine.sampler import Sampler, Sampling, truncated
from abyssal.kernels.draw import noise


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"logit_bias": {3: 101.0}},
    ],
)
def test_bad_sampling(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**options)  # type: ignore[arg-type]


def test_samples_follow_the_distribution() -> None:
    """Chi-square of 20,000 places over 8 tokens at temperature 0.7; 24.3 is exceeded once in 1,000 runs."""
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 0.9])
    sampler = Sampler(Sampling(temperature=0.7, seed=11))
    counts = np.bincount([sampler.draw(logits, place) for place in range(20_000)], minlength=8)
    want = np.exp(logits / 0.7)
    want *= 20_000 / want.sum()
    assert ((counts - want) ** 2 / want).sum() < 24.3


def test_a_seed_that_is_not_given_is_drawn_once() -> None:
    logits = np.zeros(4096)

    def tokens(sampler: Sampler) -> list[int]:
        return [sampler.draw(logits, place) for place in range(5)]

    sampler = Sampler(Sampling())
    assert tokens(sampler) == tokens(sampler) != tokens(Sampler(Sampling()))


def kept(logits: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    return set(np.flatnonzero(np.isfinite(truncated(np.array(logits), top_k, top_p, min_p))).tolist())


def test_top_p_keeps_the_token_that_crosses_the_border() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    for top_p, want in ((0.01, {0}), (0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert kept(logits, top_p=top_p) == want


def test_top_k_and_min_p() -> None:
    logits = np.log([0.05, 0.5, 0.15, 0.3]).tolist()
    assert kept(logits, top_k=2) == {1, 3}
    assert kept(logits, top_k=9) == {0, 1, 2, 3}
    assert kept(logits, min_p=0.29) == {1, 2, 3}
    assert kept(logits, min_p=1.0) == {1}
    assert kept(logits, top_k=3, top_p=0.7) == {1, 3}


def test_penalties_and_bias() -> None:
    logits = np.array([1.0, -1.0, 2.0, 0.0])
    sampler = Sampler(Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 7}))
    got = sampler.adjusted(logits, prompt=[1], answer=[2, 2])
    assert got.tolist() == [1.0, -2.0, 1.0 - 0.5 - 0.5, 7.0]
    assert logits.tolist() == [1.0, -1.0, 2.0, 0.0]


def test_a_mask_is_obeyed() -> None:
    allowed = np.array([False, False, True, False])
    for sampling in (Sampling(temperature=0), Sampling(seed=1), Sampling(seed=1, top_k=1)):
        assert Sampler(sampling).draw(np.array([9.0, 8.0, -5.0, 7.0]), 0, allowed_V=allowed) == 2


def plainly_truncated(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The definition, by sorting everything."""
    if 0 < top_k < len(logits):
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        weights = np.exp(logits[order] - logits[order[0]])
        shares = weights / weights.sum()
        kept = np.cumsum(shares) - shares < top_p
        kept[0] = True
        cut = np.full_like(logits, -np.inf)
        cut[order[kept]] = logits[order[kept]]
        logits = cut
    if min_p > 0:
        logits = np.where(logits >= logits.max() + np.log(min_p), logits, -np.inf)
    return logits


OPTIONS = [{}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 1e-9}, {"top_p": 0.9999999}, {"min_p": 0.05}]


@pytest.mark.parametrize("size", [1, 2, 600, 4096, 4097, 30000])
@pytest.mark.parametrize("kind", ["broad", "peaked", "tied", "masked"])
@pytest.mark.parametrize("options", [*OPTIONS, {"top_k": 5000, "top_p": 0.95, "min_p": 1e-4}])
def test_tokens_are_those_of_the_definition(size: int, kind: str, options: dict[str, float]) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(size=size) * {"broad": 1, "peaked": 8}.get(kind, 3)
    if kind == "tied":
        logits = np.round(logits)
    if kind == "masked":
        logits[rng.random(size) < 0.9] = -np.inf
        logits[0] = 0
    sampling = Sampling(temperature=0.8, seed=size, **options)  # type: ignore[arg-type]
    sampler = Sampler(sampling)
    want = plainly_truncated(logits / 0.8, sampling.top_k, sampling.top_p, sampling.min_p)
    assert np.array_equal(truncated(logits / 0.8, sampling.top_k, sampling.top_p, sampling.min_p), want)
    for place in range(20):
        assert sampler.draw(logits, place) == (want + noise(size, 0, place, size)).argmax()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 100}])
def test_near_ties_are_decided_as_by_definition(options: dict[str, float]) -> None:
    """All tokens score the same but for the last digits of float64."""
    for place in range(50):
        sampler = Sampler(Sampling(seed=place, **options))  # type: ignore[arg-type]
        logits = -noise(place, 0, place, 5000)
        want = truncated(logits, sampler.sampling.top_k, sampler.sampling.top_p, 0)
        assert sampler.draw(logits, place) == (want + noise(place, 0, place, 5000)).argmax()


def test_the_border_of_top_p_is_where_the_definition_puts_it() -> None:
    """Uniform probabilities whose sums meet the border up to rounding."""
    for size in (5000, 8192, 30000):
        for parts in (2, 4, 10):
            logits = np.zeros(size)
            want = plainly_truncated(logits, 0, 1 / parts, 0)
            assert np.array_equal(truncated(logits, 0, 1 / parts, 0), want)
