"""Keys and values as plain token ids among filler, asked for at the end: retrieval without words or a tokenizer.

A sequence tells some pairs, scattered in filler, and then repeats them again and again in random order; whatever
follows a repeated key is its value. Short sequences with few pairs are among them: there a small model finds out
within a hundred steps that keys are to be looked up, and long ones then come by themselves. With long ones alone it
does not find out in a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import ConfigError

SHARE = 5  # a pair and its question take four tokens: one of so many at most is a question
MOST = 48  # pairs of a sequence
FEW = 16  # keys that one is drawn from, at least


@dataclass(frozen=True)
class Pairs:
    """The generator.

    Args:
        ids: first id that is used, and the end of them.
        roles: "fixed": the first half of the ids are keys, then values, then filler; "drawn": any id may be
            anything, anew in each sequence.
        lengths: of sequences, evenly on a logarithmic scale, both ends included.
    Raises:
        ConfigError: a length leaves no room for two pairs, or there are too few ids.
    """

    ids: tuple[int, int]
    roles: Literal["fixed", "drawn"] = "drawn"
    lengths: tuple[int, int] = (48, 256)

    def __post_init__(self) -> None:
        low, high = self.lengths
        if not 4 * SHARE <= low <= high:
            raise ConfigError(f"pairs of {low} to {high} tokens: take at least {4 * SHARE}, the lower number first")
        if self.ids[1] - self.ids[0] < 4 * SHARE:
            raise ConfigError(f"pairs need {4 * SHARE} ids or more, not {self.ids[0]} to {self.ids[1]}")

    @property
    def most(self) -> int:
        """Pairs of one sequence at most: a quarter of the ids."""
        return min((self.ids[1] - self.ids[0]) // 4, MOST)

    def generate(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A sequence of random length with a random number of pairs, of which few are as likely as many."""
        low, high = np.log(self.lengths[0]), np.log(self.lengths[1] + 1)
        length = int(np.exp(rng.uniform(low, high)))
        asked = length // SHARE
        count = int(np.exp(rng.uniform(np.log(2), np.log(min(asked, self.most) + 1))))
        return self.sequence(rng, length, count, asked)

    def sequence(
        self, rng: np.random.Generator, length: int, count: int, asked: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """One sequence.

        Args:
            rng: the only source of chance.
            length: its tokens.
            count: pairs that are told.
            asked: questions; with more than pairs, each pair comes again.
        Returns:
            ids [length], and which of them answer [length]: the values behind repeated keys.
        Raises:
            ConfigError: so many do not fit.
        """
        free = length - 2 * count - 2 * asked
        if not 0 < count <= self.most or asked < 1 or free < 0:
            where = f"{length} tokens of ids {self.ids[0]} to {self.ids[1]}"
            raise ConfigError(f"{count} pairs and {asked} questions do not fit into {where}")
        first, end = self.ids
        many = (end - first) // 4  # values, and filler
        order = first + (rng.permutation(end - first) if self.roles == "drawn" else np.arange(end - first))
        # low ids are the common ones
        some = int(np.exp(rng.uniform(np.log(min(max(count, FEW), 2 * many)), np.log(2 * many + 1))))
        keys = rng.permutation(order[: len(order) - 2 * many][:some])[:count]
        values = rng.choice(order[-2 * many : -many][: max(some // 2, 1)], count)
        told = np.stack([keys, values], 1)
        filler = rng.choice(order[-many:], free)
        before = np.sort(rng.integers(free + 1, size=count))  # how much filler stands before each pair
        body = np.insert(filler, np.repeat(before, 2), told.flatten())
        rounds = [rng.permutation(count) for _ in range(-(-asked // count))]
        again = told[np.concatenate(rounds)[:asked]]
        answers = np.zeros(length, np.bool_)
        answers[length - 2 * asked + 1 :: 2] = True
        return np.concatenate([body, again.flatten()]).astype(np.int64), answers
