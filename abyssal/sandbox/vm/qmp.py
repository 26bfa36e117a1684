"""QEMU's monitor: commands and events as JSON lines over a unix socket.

The socket is one of a pair that QEMU inherits, so that no path exists that somebody else could connect to. File
descriptors travel along it (SCM_RIGHTS): QEMU then writes or reads snapshots of memory without access to any folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

from abyssal.sandbox.errors import AgentLost, SandboxError


class QmpError(SandboxError):
    """The monitor refused a command."""


class Monitor:
    """The host's end of a monitor."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._socket = connection
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending = asyncio.Lock()
        self._count = 0
        self.events: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def begin(self) -> None:
        """Wait for the greeting, and agree on the mode in which commands are taken.

        Raises:
            AgentLost: QEMU ended first.
        """
        await self._greeted
        await self.run("qmp_capabilities")

    async def run(self, command: str, *, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
        """Send a command and wait for its answer.

        Args:
            command: as QEMU names it.
            fds: descriptors that go along with it, for "getfd".
            arguments: of the command; an underscore stands for a hyphen.
        Raises:
            QmpError: it was refused.
            AgentLost: QEMU is gone.
        """
        self._count += 1
        number = self._count
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": named, "id": number}).encode() + b"\n"
        async with self._sending:
            try:
                if fds:
                    socket.send_fds(self._socket, [text], list(fds))
                else:
                    await asyncio.get_running_loop().sock_sendall(self._socket, text)
            except OSError as error:
                self._answers.pop(number, None)
                raise self._gone() from error
        return await answer

    async def migrated(self) -> None:
        """Wait until a migration has ended.

        Raises:
            QmpError: it failed.
        """
        while (state := await self.run("query-migrate")).get("status") != "completed":
            if state.get("status") in ("failed", "cancelled"):
                raise QmpError(f"the machine's state was not moved: {state.get('error-desc', state['status'])}")
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Forget the connection; waiting commands fail."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        loop, rest = asyncio.get_running_loop(), b""
        try:
            while data := await loop.sock_recv(self._socket, 65536):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.strip():
                        self._take(json.loads(line))
        except OSError:
            pass
        finally:
            self._socket.close()
            for waiting in [self._greeted, *self._answers.values()]:
                if not waiting.done():
                    waiting.set_exception(self._gone())
                    waiting.exception()  # whoever waits gets it; nobody may
            self._answers.clear()

    def _take(self, message: dict[str, Any]) -> None:
        if "QMP" in message:
            self._greeted.set_result(None)
        elif "event" in message:
            self.events = [*self.events[-63:], message["event"]]
        elif (waiting := self._answers.pop(message.get("id", 0), None)) is not None and not waiting.done():
            if "error" in message:
                waiting.set_exception(QmpError(f"QEMU refused a command: {message['error']['desc']}"))
            else:
                waiting.set_result(message["return"])

    def _gone(self) -> AgentLost:
        return AgentLost("unknown", "QEMU ended while its monitor was in use; create the sandbox again")
