"""One answer while it is being made: its tokens, its state and what decides when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from abyssal.engine.grammar import Matcher
from abyssal.engine.prefix_cache import Node
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampler
from abyssal.engine.stop import StopStrings
from abyssal.kvcache.sequence import SequenceCache


@dataclass(eq=False)
class Running:
    """One of the n answers to a request.

    Attributes:
        number: names it in the scheduler.
        request_number: the number that the caller got.
        choice: which of the n answers.
        tokens: prompt and answer so far.
        cache: its state, or None while it waits for memory.
        limit: tokens that prompt and answer may have together.
        matcher: the grammar once it holds.
        pending: the grammar before that, at its beginning.
        seen: how many of `Request.grammar_after` have come.
        blocks: what the indexers chose for the token that was read last, for a trace.
        node: where its pages end in the prefix cache.
        served: the step in which it was last served.
        arrived: order of arrival.
        mtp_position: tokens that the MTP block has read; streams_TND holds the backbone's streams from there on.
        mtp_since: first token that the MTP block has read.
    """

    number: int
    request_number: int
    choice: int
    request: Request
    tokens: list[int]
    limit: int
    sampler: Sampler
    stops: StopStrings | None
    cache: SequenceCache | None = None
    matcher: Matcher | None = None
    pending: Matcher | None = None
    seen: int = 0
    blocks: tuple[Sequence[int], ...] = ()
    node: Node | None = None
    served: int = -1
    arrived: int = 0
    mtp_position: int = 0
    mtp_since: int = 0
    streams_TND: Tensor | None = None
    siblings: list[Running] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def left(self) -> int:
        """Known tokens that have not been read."""
        return len(self.tokens) - (self.cache.position if self.cache is not None else 0)
