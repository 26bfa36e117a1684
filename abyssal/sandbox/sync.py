"""The SDK without async: the same names, the same errors, on a thread that runs the loop.

    with sync.connect("local") as hub:
        box = hub.create("container")
        print(box.run("uname").text)
        for event in box.stream("make"): ...

Nothing is written twice: a mirror passes each name on to the object of `hub` or `handles` that it stands for, waits for
what has to be waited for, and mirrors what comes back.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from abyssal.sandbox.handles import Running, SandboxFiles, Session
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.network.ports import Forward
from abyssal.sandbox.sandbox import Sandbox
from abyssal.sandbox.service import Service

_MIRRORED = (Sandboxes, Sandbox, Running, Session, SandboxFiles, Forward)
_OVER = object()


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-sdk", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a coroutine; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Mirror:
    """Stands for an object of the SDK."""

    def __init__(self, loop: Loop, target: Any):
        self._loop, self._target = loop, target

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._target, name)
        if not callable(found):
            return self._shown(found)

        def call(*arguments: Any, **options: Any) -> Any:
            plain = [item._target if isinstance(item, Mirror) else item for item in arguments]
            return self._told(found(*plain, **options))

        call.__name__, call.__doc__ = name, found.__doc__
        return call

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._target) if not name.startswith("_")]

    def __repr__(self) -> str:
        return f"sync {self._target!r}"

    def _told(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            return self._shown(self._loop.run(value))
        if isinstance(value, AsyncIterator):
            return self._each(value)
        return self._shown(value)

    def _each(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items, _OVER)

        async def close() -> None:
            await items.aclose()  # type: ignore[attr-defined]

        try:
            while (item := self._loop.run(following())) is not _OVER:
                yield self._shown(item)
        finally:
            self._loop.run(close())

    def _shown(self, value: Any) -> Any:
        if isinstance(value, _MIRRORED):
            return Mirror(self._loop, value)
        if isinstance(value, list):
            return [self._shown(item) for item in value]
        return value


class SyncSandboxes(Mirror):
    """A hub as a plain context manager; see `Sandboxes`."""

    def __enter__(self) -> Self:
        self._loop.run(self._target.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._loop.run(self._target.__aexit__(kind, error, trace))
        finally:
            self._loop.close()


def connect(where: str = "local", *, token: str | None = None, home: Path | None = None) -> SyncSandboxes:
    """A hub to enter; arguments as for `Sandboxes.connect`."""
    return SyncSandboxes(Loop(), Sandboxes.connect(where, token=token, home=home))


def over(loop: Loop, service: Service) -> SyncSandboxes:
    """A hub over a service that lives on this loop."""
    return SyncSandboxes(loop, Sandboxes(service))
