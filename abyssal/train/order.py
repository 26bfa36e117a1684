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


@dataclass(frozen=True)
class Share:
    """What a source contributes.

    Attributes:
        weight: of its tokens, against the other sources of that time.
        begin, end: tokens of all sources after which it starts and stops; None: it goes on.
    """

    weight: float
    begin: int = 0
    end: int | None = None

    def active(self, tokens: int) -> bool:
        """Whether it gives something after so many tokens."""
        return self.begin <= tokens and (self.end is None or tokens < self.end)


class Mixture:
    """Sources in fixed proportions of tokens, which may be others later.

    The next piece comes from the source that lacks most of its share, so the proportions hold at any moment, and
    nothing is drawn: cursors and counts are the whole state.

    Args:
        sources: by name.
        shares: of each.
    Raises:
        ValueError: a source has no share.
    """

    def __init__(self, sources: Mapping[str, Source], shares: Mapping[str, Share]):
        self.sources, self.shares = dict(sources), dict(shares)
        if missing := set(self.sources) - set(self.shares):
            raise ValueError(f"no share is given for {', '.join(sorted(missing))}")
        self.tokens = dict.fromkeys(self.sources, 0)
        self.lacking = dict.fromkeys(self.sources, 0.0)  # tokens that each has still to give

    def take(self, tokens: int) -> Pack:
        """The sequences of the next pass.

        Args:
            tokens: how many at most; a piece that does not fit waits for the next pass.
        Raises:
            TokenError: a source is empty, its next piece is longer than a whole pass, or none is active.
        """
        samples: list[Sample] = []
        held = 0
        while shares := self._active():
            name = max(shares, key=lambda name: self.lacking[name] + shares[name])
            piece, cursor = self.sources[name].peek()
            count = len(piece.ids) - 1
            if held + count > tokens:
                break
            samples.append(piece)
            held += count
            self._given(name, count)
            self.sources[name].cursor = cursor
        if samples:
            return pack(samples)
        if shares:
            raise TokenError(f"a piece of {count} tokens does not fit into a pass of {tokens}: make pieces shorter")
        done = sum(self.tokens.values())
        raise TokenError(f"after {done:,} tokens no source gives any: let one go on, or end the run before")

    def _active(self) -> dict[str, float]:
        """Share of each source that gives something now; together 1."""
        done = sum(self.tokens.values())
        weights = {name: self.shares[name].weight for name in self.sources if self.shares[name].active(done)}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def _given(self, name: str, count: int) -> None:
        for other, share in self._active().items():
            self.lacking[other] += share * count
        self.lacking[name] -= count
        self.tokens[name] += count

    def state_dict(self) -> dict[str, Any]:
        """Cursor, tokens and what is lacking of each source, as JSON can hold them."""
        return {
            name: {
                **asdict(source.cursor),
                "seed": source.seed,
                "tokens": self.tokens[name],
                "lacking": self.lacking[name],
            }
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
            self.lacking[name] = saved["lacking"]
