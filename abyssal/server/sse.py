"""Server-sent events, and answers that keep a quiet connection open."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def compact(value: Any) -> bytes:
    """JSON without blank space."""
    return _encode(value).encode(errors="replace")


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + compact(value) + b"\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One event named by its type."""
    return b"event: " + str(value["type"]).encode() + b"\n" + data(value)


class Stream(Response):
    """Pieces of a body as they come, something harmless while none comes, and an end when the client leaves.

    A timer writes the fillers, so that pieces pass without any waiting of their own.

    Args:
        pieces: of the body, behind `first`; closed in the end, whatever happens.
        failed: the last piece, if something is raised after the status went out.
        close: called in the end too; `pieces` may not have begun by then, and closing them does nothing.
        filler: sent after `pause` quiet seconds: a comment, an event, or blank space.
        status, headers, media_type: of the response.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        *,
        first: bytes = b"",
        failed: Callable[[Exception], bytes],
        close: Callable[[], Awaitable[None]] | None = None,
        filler: bytes = COMMENT,
        pause: float,
        headers: Mapping[str, str],
        media_type: str = "text/event-stream",
    ):
        super().__init__(None, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers},
                         media_type=media_type)  # fmt: skip
        del self.headers["content-length"]
        self._pieces, self._first, self._failed, self._close = pieces, first, failed, close
        self._filler, self._pause = filler, pause
        self._sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        tasks = [asyncio.ensure_future(work) for work in (self._pump(send), self._fill(send), left(receive))]
        try:
            await asyncio.wait([tasks[0], tasks[2]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                if not task.done():
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._pieces.aclose()  # type: ignore[attr-defined]
            if self._close is not None:
                await self._close()
        if not tasks[0].cancelled():
            tasks[0].result()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        if self._first:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for piece in self._pieces:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            last = self._failed(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _fill(self, send: Send) -> None:
        while True:
            wait = self._sent + self._pause - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            self._sent = time.monotonic()
            await send({"type": "http.response.body", "body": self._filler, "more_body": True})


async def left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
