"""Which documents a step sees: an order that a resumed run takes up at the very document (training.md 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import TokenError
from abyssal.train.packing import Ids, Pack, Sample, pack


class Documents(Protocol):
    """Documents by number, such as a tokenised file; one may also come as a `Sample`, which says what to learn."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, number: int, /) -> Ids | Sample:
        """One of them."""


@dataclass(frozen=True)
class Cursor:
    """The next piece of a source.

    Attributes:
        epoch: how often all documents have been read.
        position: documents of this epoch that are done.
        offset: tokens of the next one that are done.
    """

    epoch: int = 0
    position: int = 0
    offset: int = 0


class Source:
    """Documents in a random order, a new one in each epoch; long ones come in pieces.

    Args:
        documents: at least one of them with two tokens or more.
        seed: of the order.
        length: tokens that a piece is read in at most; neighbouring pieces share a token, which one predicts and
            the next reads.
    Raises:
        TokenError: no document holds two tokens.
    """

    def __init__(self, documents: Documents, seed: int, length: int):
        self.documents = documents
        self.seed = seed
        self.length = length
        self.cursor = Cursor()
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)

    def _number(self, cursor: Cursor) -> int:
        if cursor.epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, cursor.epoch)).permutation(len(self.documents))
            self._epoch = cursor.epoch
        return int(self._order[cursor.position])

    def peek(self) -> tuple[Sample, Cursor]:
        """The next piece, and where the cursor stands behind it; the source does not move.

        Raises:
            TokenError: no document holds two tokens.
        """
        cursor = self.cursor
        for _ in range(len(self.documents) + 1):
            if cursor.position >= len(self.documents):
                cursor = Cursor(cursor.epoch + 1)
            if cursor.position < len(self.documents):
                found = self.documents[self._number(cursor)]
                sample = found if isinstance(found, Sample) else Sample(found)
                if len(sample.ids) - cursor.offset >= 2:
                    return self._cut(sample, cursor)
            cursor = Cursor(cursor.epoch, cursor.position + 1)
        raise TokenError("no document holds two tokens: there is nothing to learn from")

    def _cut(self, sample: Sample, cursor: Cursor) -> tuple[Sample, Cursor]:
        stop = cursor.offset + self.length + 1
        part = slice(cursor.offset, stop)
        piece = Sample(sample.ids[part], None if sample.learned is None else sample.learned[part])
        if stop >= len(sample.ids):
            return piece, Cursor(cursor.epoch, cursor.position + 1)
        return piece, Cursor(cursor.epoch, cursor.position, stop - 1)


class Mixture:
    """Sources in fixed proportions of tokens.

    The next piece comes from the source that lacks most of its share, so the proportions hold at any moment, and
    nothing is drawn: cursors and counts are the whole state.

    Args:
        sources: by name.
        weights: of each, of any sum.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float]):
        self.sources = dict(sources)
        total = sum(weights[name] for name in self.sources)
        self.weights = {name: weights[name] / total for name in self.sources}
        self.tokens = dict.fromkeys(self.sources, 0)

    def take(self, tokens: int) -> Pack:
        """The sequences of the next pass.

        Args:
            tokens: how many at most; a piece that does not fit waits for the next pass.
        Raises:
            TokenError: a source is empty, or its next piece is longer than a whole pass.
        """
        samples: list[Sample] = []
        held = 0
        while True:
            after = sum(self.tokens.values()) + 1
            name = max(self.sources, key=lambda name: self.weights[name] * after - self.tokens[name])
            piece, cursor = self.sources[name].peek()
            count = len(piece.ids) - 1
            if held + count > tokens:
                break
            samples.append(piece)
            held += count
            self.sources[name].cursor = cursor
            self.tokens[name] += count
        if not samples:
            raise TokenError(f"a piece of {count} tokens does not fit into a pass of {tokens}: make pieces shorter")
        return pack(samples)

    def state_dict(self) -> dict[str, Any]:
        """Cursor and tokens of each source, as JSON can hold them."""
        return {
            name: {**asdict(source.cursor), "seed": source.seed, "tokens": self.tokens[name]}
            for name, source in self.sources.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError: a source is missing.
            ValueError: a source has another seed, so its order would be another one.
        """
        for name, source in self.sources.items():
            saved = state[name]
            if saved["seed"] != source.seed:
                raise ValueError(f"source {name} was shuffled with seed {saved['seed']}, not {source.seed}")
            source.cursor = Cursor(saved["epoch"], saved["position"], saved["offset"])
            self.tokens[name] = saved["tokens"]
