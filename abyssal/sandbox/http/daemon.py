"""The edge of this host as a process of its own, started by whoever needs it first.

It, and not the client, owns time to live: a client that crashes leaves nothing for longer than that. It listens on a
unix socket that its user alone can reach, and ends some time after its last sandbox.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from abyssal.base.home import home as default_home
from abyssal.sandbox.errors import Rejected, Timeout
from abyssal.sandbox.http.client import HttpService

SOCKET = "edge.sock"
NOTES = "edge.log"
START_S = 30.0
LINGER_S = 60.0
GRACE_S = 60.0  # for which sandboxes wait for the next edge when one was killed
_PROGRAM = "from abyssal.sandbox.http.daemon import main; main()"


def edge_home(home: Path | None = None) -> Path:
    """The folder of the local edge."""
    return (home or default_home() / "sandbox").absolute()


async def local(home: Path | None = None, *, unsafe: bool = False) -> HttpService:
    """The edge of this host, started if none runs.

    Args:
        home: its folder.
        unsafe: whether an edge that is started offers the engine `process`, which is no sandbox.
    Raises:
        Timeout: it did not start; its notes say why.
    """
    folder = edge_home(home)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    until = time.monotonic() + START_S
    started: int | None = None
    while True:
        service = HttpService("http://edge", socket=folder / SOCKET, reconnect=0.0)
        try:
            await service.health()
        except Timeout:
            await service.close()
        else:
            await service.close()
            return HttpService("http://edge", socket=folder / SOCKET)
        if started is None or not _lives(started):
            started = _start(folder, unsafe)
        if time.monotonic() > until:
            raise Timeout(f"the edge of this host did not start within {START_S:.0f} seconds: see {folder / NOTES}")
        await asyncio.sleep(0.05)


def _start(folder: Path, unsafe: bool) -> int:
    """Begin it, apart from our session and our terminal; it outlives us."""
    arguments = [sys.executable, "-c", _PROGRAM, str(folder), "unsafe" if unsafe else "safe"]
    notes = os.open(folder / NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        ends: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        ends += [(os.POSIX_SPAWN_DUP2, notes, number) for number in (1, 2)]
        return os.posix_spawn(sys.executable, arguments, os.environ, file_actions=ends, setsid=True)
    finally:
        os.close(notes)


async def end(home: Path | None = None) -> bool:
    """End the edge of this host, if one runs; returns whether one did."""
    folder = edge_home(home)
    service = HttpService("http://edge", socket=folder / SOCKET, reconnect=0.0)
    try:
        pid = (await service.health())["pid"]
    except Timeout:
        return False
    finally:
        await service.close()
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + START_S
    while time.monotonic() < until and _lives(pid):
        await asyncio.sleep(0.05)
    return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def main() -> None:
    """The process; its arguments are the folder and whether unsafe engines are offered."""
    folder, unsafe = Path(sys.argv[1]), sys.argv[2] == "unsafe"
    os.chdir("/")
    try:
        asyncio.run(_serve(folder, unsafe))
    except Rejected:  # another was faster
        sys.exit(0)


async def _serve(folder: Path, unsafe: bool) -> None:
    from abyssal.sandbox.edge import Edge
    from abyssal.sandbox.engines.registry import installed
    from abyssal.sandbox.http.run import serve, unix_socket

    edge = await Edge.open(folder, installed(folder / "engines", allow_unsafe=unsafe), grace=GRACE_S)
    await serve(edge, unix_socket(folder / SOCKET), linger=LINGER_S)
