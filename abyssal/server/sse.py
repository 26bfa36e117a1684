"""Server-sent events with comments that keep a quiet connection open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def kept_alive(events: AsyncIterator[bytes], pause: float = KEEP_ALIVE_S) -> AsyncIterator[bytes]:
    """The events, and a comment whenever none came for `pause` seconds."""
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait([following], timeout=pause))[0]:
                yield KEEP_ALIVE
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        if following is not None and not following.done():
            following.cancel()
            await asyncio.wait([following])
        await events.aclose()  # type: ignore[attr-defined]
