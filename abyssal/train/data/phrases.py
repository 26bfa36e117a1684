"""Sentences with slots, and how they are filled.

The phrases are the same for training and evaluation; what fills them comes from the pools, which are cut.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np

from abyssal.train.data.pools import Split, pick, pool

PHRASES = Path(__file__).parent / "phrases"
SLOT = re.compile(r"\{(a:)?([a-z_]+)\}")


@cache
def phrases(name: str) -> tuple[str, ...]:
    """The lines of phrases/NAME.txt; those that begin with "#" are notes."""
    lines = (PHRASES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def with_article(words: str) -> str:
    """The words after "a" or "an", by their first letter; the pools hold no exceptions but those named here."""
    silent = words.startswith(("honest", "hour"))
    sounded = words.startswith(("uni", "use", "eu", "one", "ut"))
    vowel = words[:1].lower() in tuple("aeiou")
    return ("an " if silent or (vowel and not sounded) else "a ") + words


def fill(rng: np.random.Generator, split: Split, phrase: str, **given: str) -> str:
    """A phrase with its slots filled.

    Args:
        rng: chooses from the pools.
        split: part of the pools.
        phrase: `{name}` is what is given under the name, else an entry of words/NAME.txt; `{a:name}` has its
            article; `{number}` is 2 to 99.
        given: texts for slots.
    """

    def one(match: re.Match[str]) -> str:
        article, name = match.groups()
        if name in given:
            text = given[name]
        elif name == "number":
            text = str(int(rng.integers(2, 100)))
        else:
            text = pick(rng, pool(name, split))
        return with_article(text) if article else text

    return capitalised(SLOT.sub(one, phrase))


def capitalised(text: str) -> str:
    """The text with a capital first letter, the rest unchanged."""
    return text[:1].upper() + text[1:]
