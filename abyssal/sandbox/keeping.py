"""An edge's side of the keeper, the process that holds its boxes while no edge does (`keeper`)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from abyssal.sandbox.errors import SandboxError

SOCKET, NOTES = "keeper.sock", "keeper.log"
MESSAGE = 1 << 16
MOST = 16  # descriptors of a box
ANSWER_S = 120.0  # it may be sweeping
_PROGRAM = "from abyssal.sandbox.keeper import main; main()"


class Keeping:
    """What an edge has its keeper hold; made by `take`.

    Args:
        home: folder of the edge, which holds its lock.
        grace: seconds for which boxes outlive an edge; None for edges that nobody follows.
    """

    def __init__(self, home: Path, grace: float | None):
        self._home, self._grace = home, grace
        self._keeper: socket.socket | None = None
        self._child: int | None = None
        self._held: dict[str, tuple[str, Path, Mapping[str, int]]] = {}

    @property
    def active(self) -> bool:
        """Whether boxes outlive this edge."""
        return self._grace is not None

    @classmethod
    async def take(cls, home: Path, grace: float | None) -> tuple[Self, dict[str, dict[str, int]]]:
        """What the keeper of an earlier edge holds, by box and name; the descriptors are the caller's."""
        keeping = cls(home, grace)
        keeping._keeper = await asyncio.to_thread(_connect, home / SOCKET)
        found = await asyncio.to_thread(keeping._taken)
        if grace is None:
            await keeping.close()
        return keeping, found

    def _taken(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        if self._keeper is None or self._grace is None:
            return found
        try:
            self._keeper.settimeout(ANSWER_S)
            self._keeper.send(b'{"do": "take"}')
            while True:
                data, fds, _, _ = socket.recv_fds(self._keeper, MESSAGE, MOST)
                said = json.loads(data)
                if "box" not in said:
                    break
                found[said["box"]] = dict(zip(said["names"], fds, strict=True))
            self._keeper.settimeout(None)
        except (OSError, ValueError):  # it has just ended, and with it what it held
            self._keeper.close()
            self._keeper = None
        return found

    def hold(self, box_id: str, engine: str, state: Path, handles: Mapping[str, int]) -> None:
        """Have a box outlive us.

        Args:
            box_id, handles: what; the descriptors stay ours.
            engine, state: who sweeps what is left of it.
        """
        if self._grace is not None:
            self._held[box_id] = (engine, state, handles)
            self._say({"do": "hold", "box": box_id, "engine": engine, "state": str(state), "names": [*handles]},
                      list(handles.values()))  # fmt: skip

    def drop(self, box_id: str) -> None:
        """It has ended."""
        if self._held.pop(box_id, None) is not None:
            self._say({"do": "drop", "box": box_id})

    def forget(self, box_id: str) -> None:
        """It was an earlier edge's, and is nobody's now."""
        if self._keeper is not None:
            self._say({"do": "drop", "box": box_id})

    def mend(self) -> None:
        """Begin another keeper where ours has ended, and give it all."""
        if self._keeper is None:
            return
        try:
            ended = not self._keeper.recv(MESSAGE, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return
        except ConnectionError:
            ended = True
        if ended:
            self._restart()

    async def close(self) -> None:
        """Let it end; what it still holds ends too."""
        if self._keeper is not None:
            await asyncio.to_thread(self._farewell, self._keeper)
            self._keeper = None

    def _farewell(self, keeper: socket.socket) -> None:
        with keeper, suppress(OSError):
            keeper.settimeout(ANSWER_S)
            keeper.send(b'{"do": "bye"}')
            while keeper.recv(MESSAGE):
                continue
        self._reap()

    def _say(self, said: Mapping[str, Any], fds: list[int] | None = None) -> None:
        if self._keeper is None:
            self._begin()
        assert self._keeper is not None
        try:
            socket.send_fds(self._keeper, [json.dumps(said).encode()], fds or [])
        except OSError:
            self._restart()

    def _restart(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
        self._reap()
        self._begin()
        held, self._held = self._held, {}
        for box_id, (engine, state, handles) in held.items():
            self.hold(box_id, engine, state, handles)

    def _begin(self) -> None:
        path = self._home / SOCKET
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            with _short(path) as name:
                listening.bind(name)
            path.chmod(0o600)
            listening.listen(8)
            self._keeper = _connect(path)
            notes = os.open(self._home / NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                ends = [(os.POSIX_SPAWN_DUP2, listening.fileno(), 0)]
                ends += [(os.POSIX_SPAWN_DUP2, notes, number) for number in (1, 2)]
                program = [sys.executable, "-c", _PROGRAM, str(self._home), str(self._grace)]
                self._child = os.posix_spawn(sys.executable, program, os.environ, file_actions=ends, setsid=True)
            finally:
                os.close(notes)
        if self._keeper is None:
            raise SandboxError(f"the keeper of {self._home} cannot be reached at {path}")

    def _reap(self) -> None:
        if self._child is not None:
            with suppress(ChildProcessError):
                os.waitpid(self._child, 0)
            self._child = None


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of a socket however long its folder's is: the kernel takes 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _connect(path: Path) -> socket.socket | None:
    """None where nobody listens."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(path) as name:
            found.connect(name)
    except OSError:
        found.close()
        return None
    return found
