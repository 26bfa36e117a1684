"""Held-out conversations of a generator, named for the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from abyssal.train.data.example import Example, ThinkingMode
from abyssal.train.data.pools import seeded


@dataclass(frozen=True)
class Case:
    """A conversation of a generator, of which the model gives the last reply."""

    id: str
    example: Example


class Maker(Protocol):
    """A generator of conversations by kind and thinking mode."""

    def generate(self, rng: np.random.Generator, *, kind: str, mode: ThinkingMode) -> Example:
        """One of them."""


def cases(suite: str, maker: Maker, kinds: Sequence[str], count: int, seed: int) -> list[Case]:
    """So many conversations of each kind, in non-think.

    Args:
        suite: the first part of their names.
        maker: of held-out ones.
        kinds: of the generator.
        count: of each.
        seed: another one gives other conversations.
    """
    return [
        Case(
            f"{suite}/{kind}/{number}",
            maker.generate(seeded(f"{suite} {kind}", "held_out", number, seed), kind=kind, mode="non-think"),
        )
        for kind in kinds
        for number in range(count)
    ]
