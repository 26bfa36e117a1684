"""An answer as blocks, one after another, for the APIs that show it so: thinking, then text, then calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abyssal.chat.api import CallMade, ChatEvent, ChatRequest, Finished, ReasoningDelta, TextDelta
from abyssal.server.errors import ApiError

Kind = Literal["thinking", "text", "call"]
ARGUMENTS = 256  # characters of a piece of a call's arguments
RETRY_S = 10


def pieces(arguments: str) -> list[str]:
    """A call's arguments as a stream sends them."""
    return [arguments[at : at + ARGUMENTS] for at in range(0, len(arguments), ARGUMENTS)]


@dataclass(frozen=True)
class Opened:
    """A block begins; `call` is the call that it is about to show."""

    index: int
    kind: Kind
    call: CallMade | None


@dataclass(frozen=True)
class Grown:
    """More of the open block."""

    index: int
    kind: Kind
    text: str


@dataclass(frozen=True)
class Closed:
    """A block is over.

    Attributes:
        text: all of it.
        cut: the answer was cut off in it.
    """

    index: int
    kind: Kind
    call: CallMade | None
    text: str
    cut: bool


Change = Opened | Grown | Closed


class Blocks:
    """The blocks of a turn's one answer.

    In thinking mode the first is thinking, be it empty: clients send back what they got, and with tools in play
    thinking that does not come back counts as missing.
    """

    def __init__(self, request: ChatRequest):
        self._owes_thinking = request.answer_thinks
        self._open: Opened | None = None
        self._count = 0
        self._text: list[str] = []

    def add(self, event: ChatEvent) -> list[Change]:
        """What an event of the turn changes.

        Raises:
            ApiError: 500, generation failed; 503, the server interrupted it.
        """
        if isinstance(event, ReasoningDelta):
            return [*self._reach("thinking"), self._grow(event.text)]
        if isinstance(event, TextDelta):
            return [*self._thinking(), *self._reach("text"), self._grow(event.text)]
        if isinstance(event, CallMade):
            begun = [*self._thinking(), *self._begin("call", event)]
            return [*begun, *(self._grow(piece) for piece in pieces(event.arguments)), *self._close()]
        if isinstance(event, Finished):
            if event.reason == "failed":
                raise ApiError(500, event.error or "generation failed: try again")
            if event.reason == "interrupted":
                raise ApiError(503, "the server is shutting down: try again later", code="overloaded",
                               retry_after=RETRY_S)  # fmt: skip
            return [*self._thinking(), *self._close(cut=event.reason == "length")]
        return []

    def _thinking(self) -> list[Change]:
        """The thinking that must come first, if it has not."""
        return self._begin("thinking") if self._owes_thinking else []

    def _reach(self, kind: Kind) -> list[Change]:
        return [] if self._open is not None and self._open.kind == kind else self._begin(kind)

    def _begin(self, kind: Kind, call: CallMade | None = None) -> list[Change]:
        closed = self._close()
        self._owes_thinking = False
        self._open = Opened(self._count, kind, call)
        return [*closed, self._open]

    def _grow(self, text: str) -> Grown:
        assert self._open is not None
        self._text.append(text)
        return Grown(self._open.index, self._open.kind, text)

    def _close(self, cut: bool = False) -> list[Change]:
        if self._open is None:
            return []
        closed = Closed(self._open.index, self._open.kind, self._open.call, "".join(self._text), cut)
        self._open = None
        self._count += 1
        self._text.clear()
        return [closed]
