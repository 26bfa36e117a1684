"""How much may run at once, and how much a key may use (api.md 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from abyssal.server.errors import ApiError
from abyssal.server.settings import Settings

RETRY_S = 5
DRAIN_RETRY_S = 30


class Limits:
    """Counts requests at once and tokens used, by caller.

    Attributes:
        running: requests at once.
        draining: the server is about to end and takes no more.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._by_caller: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self.running = 0
        self.draining = False

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """A place among the requests that run.

        Raises:
            ApiError: 503 while draining, 429 with Retry-After if there is none, 402 if the key's tokens are used.
        """
        s = self._settings
        if self.draining:
            raise ApiError(503, "the server is shutting down: try again later", code="overloaded",
                           retry_after=DRAIN_RETRY_S)  # fmt: skip
        if self.running >= s.requests:
            raise ApiError(429, f"{self.running} requests run or wait here: come back", code="overloaded",
                           retry_after=RETRY_S)  # fmt: skip
        if s.requests_per_key is not None and self._by_caller[caller] >= s.requests_per_key:
            raise ApiError(429, f"{s.requests_per_key} requests of this key are running: wait for one of them",
                           code="rate_limit_exceeded", retry_after=RETRY_S)  # fmt: skip
        if s.tokens_per_key is not None and self._tokens[caller] >= s.tokens_per_key:
            raise ApiError(402, f"this key has used its {s.tokens_per_key} tokens: use another, or ask the operator",
                           code="insufficient_quota")  # fmt: skip
        self.running += 1
        self._by_caller[caller] += 1
        try:
            yield
        finally:
            self.running -= 1
            self._by_caller[caller] -= 1
            if not self._by_caller[caller]:
                del self._by_caller[caller]

    def used(self, caller: str, tokens: int) -> None:
        """A caller has used tokens."""
        self._tokens[caller] += tokens
