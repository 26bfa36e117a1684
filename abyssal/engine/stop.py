"""Stop strings, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopStrings:
    """Looks for texts in the bytes of an answer.

    Args:
        texts: what ends the answer.
        token_bytes: the bytes of a token.

    Attributes:
        settled: bytes of the answer that belong to no stop string, found or begun.
        found: the stop string that was found, or None.
    """

    def __init__(self, texts: Sequence[str], token_bytes: Callable[[int], bytes]):
        self._texts = [text.encode() for text in texts]
        self._token_bytes = token_bytes
        self._rest = b""  # bytes behind `settled`
        self.settled = 0
        self.found: str | None = None

    def add(self, token: int) -> bool:
        """One more token; True if a stop string is complete."""
        self._rest += self._token_bytes(token)
        places = [(at, text) for text in self._texts if (at := self._rest.find(text)) >= 0]
        if places:
            at, text = min(places)
            self.settled += at
            self.found = text.decode()
            return True
        held = max(
            (n for text in self._texts for n in range(min(len(text) - 1, len(self._rest)), 0, -1)
             if self._rest.endswith(text[:n])),
            default=0,
        )  # fmt: skip
        free = len(self._rest) - held
        self.settled += free
        self._rest = self._rest[free:]
        return False

    def finish(self) -> None:
        """The answer ended otherwise: what was held back belongs to it."""
        self.settled += len(self._rest)
        self._rest = b""
