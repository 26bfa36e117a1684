"""A running QEMU: its process, and the three sockets that lead into it.

monitor    commands to QEMU itself (`qmp`)
agent      the guest agent's port, a byte stream
console    what the guest's kernel says; the end of it tells why a guest died
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

from abyssal.sandbox.errors import AgentLost, Cause, Timeout, Unsupported
from abyssal.sandbox.vm import confine, qemu
from abyssal.sandbox.vm.qemu import Hardware, Wires
from abyssal.sandbox.vm.qmp import Monitor

_TAIL = 64 * 1024
_PANIC = (b"Kernel panic", b"Oops:", b"abyssal boot:")


class Machine:
    """A QEMU process.

    Attributes:
        hardware: of its guest.
        memory: descriptor of the file that is the guest's memory.
        shared: whether the guest's writes are in that file.
        monitor, reader, writer: see the module.
    """

    def __init__(self, hardware: Hardware, memory: int, shared: bool, scratch: Path):
        self.hardware, self.memory, self.shared, self.scratch = hardware, memory, shared, scratch
        self.monitor: Monitor
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.stopped = False
        self._process: asyncio.subprocess.Process
        self._said = b""
        self._console = b""
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        box_id: str,
        hardware: Hardware,
        memory: int,
        scratch: Path,
        *,
        shared: bool,
        incoming: bool = False,
        admit: Callable[[int], None] = lambda _pid: None,
    ) -> Machine:
        """Start QEMU; its guest's processors stand still until `go`.

        Args:
            box_id: whose it is.
            hardware: see there.
            memory: descriptor of the memory's file; the machine closes it in the end.
            scratch: the disk that the guest writes to.
            shared: whether the guest's writes go to the memory's file.
            incoming: whether a saved state will be loaded.
            admit: called with the process's number before it does anything, to put it under limits.
        Raises:
            Unsupported: QEMU is missing or does not start; says what it said.
        """
        self = cls(hardware, memory, shared, scratch)
        with contextlib.ExitStack() as stack:
            ours, theirs = [], []
            for _ in range(3):
                mine, its = socket.socketpair()
                ours.append(mine)
                theirs.append(stack.enter_context(its).fileno())
            wires = _wires(stack, theirs, hardware, memory, scratch)
            if os.geteuid() == 0:
                os.chown(scratch, confine.user_of(box_id), -1)
            line = qemu.argv(hardware, wires, shared=shared, incoming=incoming)
            command = confine.confined(box_id, line, kvm=hardware.accel == "kvm")
            self._process = await asyncio.create_subprocess_exec(
                *command,
                pass_fds=wires.all,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            )
        self._tasks.append(asyncio.create_task(self._hear()))
        self.monitor = Monitor(ours[0])
        self.reader, self.writer = await asyncio.open_connection(sock=ours[1])
        console, closing = await asyncio.open_connection(sock=ours[2])
        self._tasks.append(asyncio.create_task(self._listen(console, closing)))
        try:
            admit(self._process.pid)
            assert self._process.stdin is not None
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
            await self.monitor.begin()
        except AgentLost as error:
            await self.end()
            said = self._said.decode(errors="replace").strip()[-300:] or "nothing"
            raise Unsupported(f"QEMU did not start; it said: {said}") from error
        except BaseException:
            await self.end()
            raise
        return self

    @property
    def pid(self) -> int:
        """Of the outermost process."""
        return self._process.pid

    @property
    def console(self) -> str:
        """The end of what the guest's kernel said."""
        return self._console.decode(errors="replace")

    def cause(self) -> Cause:
        """Why nobody answers any more, as far as the console and the process tell."""
        if any(word in self._console for word in _PANIC):
            return "guest-panic"
        return "killed" if self.stopped else "unknown"

    async def go(self) -> None:
        """Let the guest's processors run."""
        await self.monitor.run("cont")

    async def halt(self) -> None:
        """Stop them where they are."""
        await self.monitor.run("stop")

    async def end(self, patience: float = 10.0) -> None:
        """Kill QEMU and let go of all that it had.

        Raises:
            Timeout: it does not die.
        """
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        try:
            async with asyncio.timeout(patience):
                await self._process.wait()
        except TimeoutError as error:
            raise Timeout(f"QEMU (process {self.pid}) did not end within {patience:g} s of being killed") from error
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        with contextlib.suppress(AttributeError):
            await self.monitor.close()
            self.writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    async def _hear(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(4096):
            self._said = (self._said + data)[-4096:]

    async def _listen(self, console: asyncio.StreamReader, closing: asyncio.StreamWriter) -> None:
        try:
            while data := await console.read(4096):
                self._console = (self._console + data)[-_TAIL:]
        finally:
            closing.close()


def _wires(stack: contextlib.ExitStack, sockets: list[int], hardware: Hardware, memory: int, scratch: Path) -> Wires:
    def opened(path: Path | None, flags: int = os.O_RDONLY) -> int | None:
        if path is None:
            return None
        fd = os.open(path, flags | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd

    writable = opened(scratch, os.O_RDWR)
    assert writable is not None
    layers = tuple(fd for layer in hardware.layers if (fd := opened(layer)) is not None)
    return Wires(
        monitor=sockets[0],
        agent=sockets[1],
        console=sockets[2],
        memory=memory,
        scratch=writable,
        kernel=opened(hardware.kernel),
        initramfs=opened(hardware.initramfs),
        disk=opened(hardware.disk),
        layers=layers,
    )
