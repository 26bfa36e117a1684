"""A subprocess of the host as the contract's `Process`."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import struct
import termios
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from abyssal.sandbox.api import Command, Exit, ProcessEvent, Stderr, Stdout
from abyssal.sandbox.errors import NotFound, PathError

CHUNK = 65536
LINGER_S = 0.1  # what children that live on may still write after their parent ended


class HostProcess:
    """One program; see `Process`."""

    def __init__(
        self, process: asyncio.subprocess.Process, master: int | None, command: Command, kill: Callable[[int], None]
    ):
        self.pid = process.pid
        self._process, self._master, self._command, self._kill = process, master, command, kill
        self._queue: asyncio.Queue[ProcessEvent] = asyncio.Queue(4)
        self._begin = time.monotonic()
        self._task = asyncio.create_task(self._run())

    @classmethod
    async def start(
        cls, command: Command, cwd: Path, env: Mapping[str, str], kill: Callable[[int], None]
    ) -> HostProcess:
        """Start it; `kill` signals all that it started."""
        master: int | None = None
        slave: int | None = None
        try:
            if command.tty is not None:
                master, slave = pty.openpty()
                _resize(master, *command.tty)
            ends = slave if slave is not None else asyncio.subprocess.PIPE
            feed = slave if slave is not None else (
                asyncio.subprocess.PIPE if command.stdin else asyncio.subprocess.DEVNULL
            )  # fmt: skip
            process = await asyncio.create_subprocess_exec(
                *command.argv, cwd=cwd, env=dict(env), stdin=feed, stdout=ends, stderr=ends,
                start_new_session=True, limit=CHUNK,
                preexec_fn=None if slave is None else _take_terminal,
            )  # fmt: skip
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            if master is not None:
                os.close(master)
            raise NotFound(f"no program {command.argv[0]} can be run") from None
        except ValueError as error:
            raise PathError(f"the command cannot be run: {error}") from None
        finally:
            if slave is not None:
                os.close(slave)
        return cls(process, master, command, kill)

    async def events(self) -> AsyncIterator[ProcessEvent]:
        while True:
            event = await self._queue.get()
            yield event
            if isinstance(event, Exit):
                return

    async def write(self, data: bytes) -> None:
        if self._master is not None:
            await asyncio.to_thread(os.write, self._master, data)
        elif self._process.stdin is not None:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._process.stdin.write(data)
                await self._process.stdin.drain()

    async def close_stdin(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        elif self._master is not None:
            os.write(self._master, b"\x04")

    async def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self._kill(number)
            return
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def resize(self, rows: int, columns: int) -> None:
        if self._master is not None:
            _resize(self._master, rows, columns)

    async def _run(self) -> None:
        timed_out = False
        pumps = [asyncio.create_task(pump) for pump in self._pumps()]
        try:
            async with asyncio.timeout(self._command.timeout):
                code = await self._process.wait()
        except TimeoutError:
            timed_out = True
            self._kill(signal.SIGKILL)
            code = await self._process.wait()
        if not self._command.keep:
            self._kill(signal.SIGKILL)
        await self._drain(pumps)
        if self._master is not None:
            os.close(self._master)
            self._master = None
        number = -code if code < 0 else None
        duration = round((time.monotonic() - self._begin) * 1000)
        await self._queue.put(Exit(code if number is None else 128 + number, number, timed_out, None, duration))

    async def _drain(self, pumps: list[asyncio.Task[None]]) -> None:
        """Read on while somebody reads us and something comes; then leave children that live on alone."""
        while True:
            _, left = await asyncio.wait(pumps, timeout=LINGER_S)
            if not left:
                return
            if not self._queue.full():
                for pump in left:
                    pump.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                return

    def _pumps(self) -> list[Coroutine[Any, Any, None]]:
        if self._master is not None:
            return [self._pump_terminal(self._master)]
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        return [self._pump(self._process.stdout, Stdout), self._pump(self._process.stderr, Stderr)]

    async def _pump(self, reader: asyncio.StreamReader, kind: type[Stdout | Stderr]) -> None:
        offset = 0
        while data := await reader.read(CHUNK):
            await self._queue.put(kind(data, offset))
            offset += len(data)

    async def _pump_terminal(self, master: int) -> None:
        loop = asyncio.get_running_loop()
        os.set_blocking(master, False)
        readable = asyncio.Event()
        offset = 0
        while True:
            readable.clear()
            loop.add_reader(master, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(master)
            try:
                data = os.read(master, CHUNK)
            except BlockingIOError:
                continue
            except OSError:  # all its ends are closed
                return
            if not data:
                return
            await self._queue.put(Stdout(data, offset))
            offset += len(data)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _resize(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
