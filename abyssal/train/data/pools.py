"""Words and seeds, cut into a part to train on and a part that training never sees (evals.md 3.2).

Every list under words/ but common.txt is cut by the digest of its entries, and everything that is made up (a name,
a problem) by the digest of what it says. So no held-out example shares its names, tools or problems with training,
whatever the seeds are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
TRAIN_TENTHS = 7
WIDE = ("things", "adjectives", "places", "roles", "tool_objects")  # where any word may stand
WORDS = Path(__file__).parent / "words"
T = TypeVar("T")


def split_of(key: str) -> Split:
    """The part that something of this name belongs to."""
    digest = hashlib.sha256(key.encode()).digest()
    return "train" if int.from_bytes(digest[:4], "big") % 10 < TRAIN_TENTHS else "held_out"


@cache
def entries(name: str) -> tuple[str, ...]:
    """All entries of words/NAME.txt: one a line; lines that begin with "#" are notes."""
    lines = (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


@cache
def pool(name: str, split: Split) -> tuple[str, ...]:
    """The entries of words/NAME.txt that belong to a part."""
    return tuple(entry for entry in entries(name) if split_of(f"{name}|{entry}") == split)


@cache
def wide_pool(name: str, split: Split) -> tuple[str, ...]:
    """The same; of those in `WIDE`, for training, with thousands of common words that need not make sense there.

    From a hundred words a model learns those words by heart; from thousands, to take any word from its text.
    """
    own = pool(name, split)
    return own if split == "held_out" or name not in WIDE else tuple(dict.fromkeys((*own, *entries("common"))))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of them, of any type (`Generator.choice` would make an array)."""
    return choices[int(rng.integers(len(choices)))]


def pick_some(rng: np.random.Generator, choices: Sequence[T], count: int) -> list[T]:
    """So many different ones, in random order."""
    return [choices[int(i)] for i in rng.permutation(len(choices))[:count]]


def draw(split: Split, make: Callable[[], str]) -> str:
    """Call `make` until what it gives belongs to the part."""
    while split_of(made := make()) != split:
        pass
    return made


def seeded(domain: str, split: Split, index: int, seed: int = 0) -> np.random.Generator:
    """The generator of example `index`; the same on every machine, and never the same in both parts."""
    digest = hashlib.sha256(f"{domain}|{split}|{seed}|{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
