"""The server process of an edge: listen on an address or a unix socket, and end in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from abyssal.sandbox.edge import Edge
from abyssal.sandbox.http.access import Project
from abyssal.sandbox.http.server import SandboxServer


class _Uvicorn(uvicorn.Server):
    """Ends when asked to, at once when asked again."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Having obeyed SIGTERM is success, so it is not raised again; SIGINT stays what it is for every command."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if sig == signal.SIGINT:
            self._captured_signals.append(sig)

    def end(self) -> None:
        """As a signal does."""
        self.should_exit = True


async def serve(
    edge: Edge,
    listening: socket.socket,
    *,
    projects: Sequence[Project] = (),
    ready: Callable[[], None] = lambda: None,
    linger: float | None = None,
) -> None:
    """Serve an edge until SIGINT or SIGTERM; sandboxes live on.

    Args:
        edge: open; closed in the end.
        listening: where.
        projects: who may call; none for everybody who reaches the address.
        ready: called once requests are answered.
        linger: end by itself after so many seconds without a sandbox; None for never.
    """
    server = SandboxServer(edge, projects)
    config = uvicorn.Config(
        server.app(), log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=2, ws="websockets-sansio",
    )  # fmt: skip
    running = _Uvicorn(config)
    task = asyncio.create_task(running.serve([listening]))
    try:
        while not running.started and not task.done():
            await asyncio.sleep(0.01)
        if running.started:
            ready()
        watch = asyncio.create_task(_linger(edge, running.end, linger)) if linger is not None else None
        await task
        if watch is not None:
            watch.cancel()
    finally:
        await edge.close()


async def _linger(edge: Edge, end: Callable[[], None], seconds: float) -> None:
    quiet = time.monotonic()
    while time.monotonic() - quiet < seconds:
        await asyncio.sleep(min(seconds, 1.0))
        if edge.admission.sandboxes or edge.admission.waiting:
            quiet = time.monotonic()
    end()


def unix_socket(path: Path) -> socket.socket:
    """A socket that only this user reaches; the caller holds the home's lock, so an old one is a leftover."""
    with suppress(FileNotFoundError):
        path.unlink()
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.bind(str(path))
    path.chmod(0o600)
    found.listen(128)
    return found
