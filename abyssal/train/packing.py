"""Documents side by side in one pass (training.md 6).

Each document is a sequence of its own for `Transformer.run`, so window, compressors and blocks cannot reach into
another one: there is no mask that could be forgotten, and nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.base.errors import TokenError
from abyssal.kvcache import SequenceCache
from abyssal.model import Batch, Output, Recorder, Transformer

UNIT = 128  # the longest block: skips at its multiples cut none
Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Attributes:
        ids: its n + 1 tokens; the model reads n and predicts n.
        learned: [n + 1] which tokens are to be predicted; None for all. The first never is.
    """

    ids: Ids
    learned: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Pack:
    """Sequences of one pass, one behind the other, T tokens in all.

    Attributes:
        ids_T: what the model reads.
        targets_T: the token after each.
        learned_T: whether that one is to be predicted.
        later_T: the token after that, for MTP; anything at the end of a sequence.
        later_learned_T: whether it is to be predicted.
        lengths: tokens of each sequence.
        skips: for each sequence, how much further its positions are turned, or None; see `Batch`.
    """

    ids_T: Tensor
    targets_T: Tensor
    learned_T: Tensor
    later_T: Tensor
    later_learned_T: Tensor
    lengths: tuple[int, ...]
    skips: tuple[NDArray[np.int64] | None, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    def run(self, model: Transformer, recorder: Recorder | None = None) -> tuple[Output, Batch]:
        """One pass from the start of every sequence, and where its tokens stand, for `Transformer.draft`."""
        memory = model.new_memory()
        caches = [SequenceCache(memory) for _ in self.lengths]
        out = model.run(self.ids_T, caches, self.lengths, recorder=recorder, skips=self.skips)
        batch = Batch(caches, self.lengths, [0] * len(caches), skips=self.skips)
        batch.recorder = recorder
        return out, batch


def pack(samples: Sequence[Sample]) -> Pack:
    """Lay samples one behind the other.

    Raises:
        TokenError: there is none, or one has fewer than two tokens and so nothing to predict.
    """
    if not samples or min(len(sample.ids) for sample in samples) < 2:
        raise TokenError("nothing to predict: a pack needs sequences of two tokens or more")
    columns: list[list[NDArray[np.generic]]] = [[], [], [], [], []]
    for sample in samples:
        ids = np.asarray(sample.ids, np.int64)
        learned = np.ones(len(ids), np.bool_) if sample.learned is None else sample.learned
        later, later_learned = np.append(ids[2:], 0), np.append(learned[2:], False)
        for column, part in zip(columns, (ids[:-1], ids[1:], learned[1:], later, later_learned), strict=True):
            column.append(part)
    ids_T, targets_T, learned_T, later_T, later_learned_T = (torch.from_numpy(np.concatenate(c)) for c in columns)
    lengths = tuple(len(sample.ids) - 1 for sample in samples)
    return Pack(ids_T, targets_T, learned_T, later_T, later_learned_T, lengths, (None,) * len(lengths))


def position_skips(length: int, limit: int, rng: np.random.Generator) -> NDArray[np.int64] | None:
    """How much further each position of a sequence is turned, so that far positions occur in short ones (PoSE).

    The sequence is cut at multiples of 128 into two to four pieces, with a gap before each but the first: a multiple
    of 128, log-uniform, so that near and far distances are equally common in powers of two.

    Args:
        length: tokens.
        limit: positions stay below it.
        rng: draws cuts and gaps.
    Returns:
        [length], rising in steps; None if the sequence is too short to cut, or the limit leaves no room.
    """
    places, room = (length - 1) // UNIT, (limit - length) // UNIT
    if places < 1 or room < 1:
        return None
    count = min(int(rng.integers(1, 4)), places)
    skips = np.zeros(length, np.int64)
    for cut in np.sort(rng.choice(places, count, replace=False)) + 1:
        gap = min(int(math.exp(rng.uniform(0.0, math.log(room + 1)))), room)
        skips[cut * UNIT :] += gap * UNIT
        room -= gap
        if not room:
            break
    return skips


def with_skips(packed: Pack, limit: int, share: float, key: Sequence[int]) -> Pack:
    """The same tokens with position skips in a share of the sequences.

    Args:
        packed: the sequences.
        limit: positions stay below it.
        share: of the sequences, 0 to 1.
        key: names the step: equal keys give equal skips, so that a resumed run sees what an unbroken one sees.
    """
    rng = np.random.default_rng(tuple(key))
    drawn = [
        position_skips(length, limit, rng) if skipped else None
        for length, skipped in zip(packed.lengths, rng.random(len(packed.lengths)) < share, strict=True)
    ]
    return replace(packed, skips=tuple(drawn))
