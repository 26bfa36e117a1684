"""Stretches of plain token ids that come again and again: whatever began before goes on as it did.

Copying a name of several tokens is this and nothing else. Text teaches it slowly, since most of its tokens follow from
what is common; here most tokens follow from their like before, near or far, and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import ConfigError

LONGEST = 16  # tokens of a stretch
SHORTEST = 20  # tokens of a sequence
NEAR = 0.3  # of those that come again are among the last `RECENT` ones, the others among the older half
RECENT = 4
FEWEST = 6  # one token of so many, to one of two, is of a stretch that was not there before


@dataclass(frozen=True)
class Echoes:
    """The generator.

    Args:
        ids: first id that is used, and the end of them.
        lengths: of sequences, evenly on a logarithmic scale, both ends included.
    Raises:
        ConfigError: sequences are too short, or there are too few ids.
    """

    ids: tuple[int, int]
    lengths: tuple[int, int] = (48, 256)

    def __post_init__(self) -> None:
        low, high = self.lengths
        if not SHORTEST <= low <= high:
            raise ConfigError(f"echoes of {low} to {high} tokens: take at least {SHORTEST}, the lower number first")
        if self.ids[1] - self.ids[0] < high:
            raise ConfigError(f"echoes of {high} tokens need as many ids, not {self.ids[0]} to {self.ids[1]}")

    def generate(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A sequence of random length.

        No id is in two stretches, so an id tells which one goes on. Low ids are the common ones.

        Args:
            rng: the only source of chance.
        Returns:
            ids [length], and which of them follow [length]: those of a stretch that came before, but for its first.
        """
        length = _even(rng, *self.lengths)
        room = _even(rng, max(length // FEWEST, 4), length // 2)  # few stretches are as likely as many
        many = self.ids[1] - self.ids[0]
        fresh = (self.ids[0] + rng.permutation(_even(rng, room, many))[:room]).tolist()
        waiting = []
        while fresh:
            size = _even(rng, 2, LONGEST)
            waiting.append(fresh[:size])
            fresh = fresh[size:]
        waiting.reverse()
        telling = 1.2 * room / length  # so often that mostly all have been told before the end
        known: list[list[int]] = []
        sequence: list[int] = []
        follows: list[bool] = []
        while len(sequence) < length:
            if waiting and (not known or rng.random() < telling):
                known.append(waiting.pop())
                sequence += known[-1]
                follows += [False] * len(known[-1])
                continue
            place = int(rng.integers(-(-len(known) // 2)))
            if rng.random() < NEAR:
                place = max(len(known) - 1 - int(rng.integers(RECENT)), 0)
            stretch = known.pop(place)
            known.append(stretch)
            sequence += stretch
            follows += [False] + [True] * (len(stretch) - 1)
        return np.array(sequence[:length], np.int64), np.array(follows[:length], np.bool_)


def _even(rng: np.random.Generator, low: int, high: int) -> int:
    """A number from `low` to `high`, evenly on a logarithmic scale."""
    return min(int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))), high)
