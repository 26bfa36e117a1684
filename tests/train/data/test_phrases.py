"""Slots, articles and capitals."""

from __future__ import annotations

import re

import numpy as np
import pytest

from abyssal.train.data.phrases import PHRASES, SLOT, fill, phrases, with_article
from abyssal.train.data.pools import SPLITS, WORDS, pool

GIVEN = {"key", "value", "attribute"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lamp", "a lamp"),
        ("old lamp", "an old lamp"),
        ("honest man", "an honest man"),
        ("university", "a university"),
        ("umbrella", "an umbrella"),
        ("Oslo man", "an Oslo man"),
    ],
)
def test_articles(words: str, expected: str) -> None:
    assert with_article(words) == expected


def test_filling() -> None:
    rng = np.random.default_rng(0)
    assert fill(rng, "train", "the {key} is {a:value}.", key="gate", value="arch") == "The gate is an arch."
    number = fill(rng, "train", "{number}")
    assert 2 <= int(number) < 100
    assert fill(rng, "held_out", "{cities}") in pool("cities", "held_out")


@pytest.mark.parametrize("name", ["filler", "needles", "questions", "lookups", "lines"])
def test_every_slot_can_be_filled(name: str) -> None:
    for phrase in phrases(name):
        for _, slot in SLOT.findall(phrase):
            assert slot in GIVEN or slot == "number" or (WORDS / f"{slot}.txt").is_file(), phrase
        text = fill(np.random.default_rng(1), "train", phrase, key="k", value="v", attribute="t")
        assert not re.search(r"[{}]|  ", text) and text.isascii()


@pytest.mark.parametrize("name", sorted(path.stem for path in PHRASES.glob("*.txt")))
def test_a_phrase_stands_once_and_slots_give_their_articles(name: str) -> None:
    assert len(set(phrases(name))) == len(phrases(name))
    assert not [phrase for phrase in phrases(name) if re.search(r"\b[Aa]n? \{", phrase)]


def test_the_parts_fill_differently() -> None:
    words = {split: {fill(np.random.default_rng(i), split, "{roles}").lower() for i in range(300)} for split in SPLITS}
    assert not words["train"] & words["held_out"]
