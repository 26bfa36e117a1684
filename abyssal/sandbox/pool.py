"""Boxes that were started before anybody asked for them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from abyssal.sandbox.api import Box, Spec
from abyssal.sandbox.errors import SandboxError

logger = logging.getLogger("abyssal.sandbox")
RETRY_S = 5.0
Make = Callable[[Spec], Awaitable[tuple[str, Box]]]
Drop = Callable[[str, Box], Awaitable[None]]


def kind(spec: Spec) -> Spec:
    """What of a request a box has to be started with; two requests of one kind can be given one box."""
    return replace(spec, labels={}, ttl=1.0, idle_ttl=None)


class WarmPool:
    """Keeps some boxes of each kind ready, and starts another when one is taken.

    Args:
        sizes: kinds and how many of each.
        make: starts a box and returns its id and itself.
        drop: ends one.
    """

    def __init__(self, sizes: Sequence[tuple[Spec, int]], make: Make, drop: Drop):
        self._sizes = {_key(spec): (kind(spec), count) for spec, count in sizes}
        self._make, self._drop = make, drop
        self._ready: dict[str, deque[tuple[str, Box]]] = {key: deque() for key in self._sizes}
        self._fillers: dict[str, asyncio.Task[None]] = {}
        self._closed = False
        self.taken = 0
        self.missed = 0

    @property
    def ids(self) -> set[str]:
        """Of boxes that are ready."""
        return {box_id for ready in self._ready.values() for box_id, _ in ready}

    def fill(self) -> None:
        """Start what is missing, in the background."""
        for key in self._sizes:
            if not self._closed and (key not in self._fillers or self._fillers[key].done()):
                self._fillers[key] = asyncio.create_task(self._fill(key))

    def take(self, spec: Spec) -> tuple[str, Box] | None:
        """A box that is ready, or None."""
        ready = self._ready.get(_key(spec))
        if ready is None:
            return None
        if not ready:
            self.missed += 1
            return None
        self.taken += 1
        found = ready.popleft()
        self.fill()
        return found

    async def full(self) -> None:
        """Wait until nothing is missing."""
        self.fill()
        await asyncio.gather(*self._fillers.values())

    async def close(self) -> None:
        """End them all."""
        self._closed = True
        for filler in self._fillers.values():
            filler.cancel()
        await asyncio.gather(*self._fillers.values(), return_exceptions=True)
        for ready in self._ready.values():
            while ready:
                await self._drop(*ready.popleft())

    async def _fill(self, key: str) -> None:
        spec, count = self._sizes[key]
        while len(self._ready[key]) < count:
            try:
                self._ready[key].append(await self._make(spec))
            except SandboxError as error:
                logger.warning("a warm box could not be started", extra={"why": str(error)})
                await asyncio.sleep(RETRY_S)


def _key(spec: Spec) -> str:
    return repr(kind(spec))
