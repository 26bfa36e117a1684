"""The host's side of a guest agent: one byte stream, many operations at once.

    Agent            the stream: frames out, frames in, to whom they belong
    AgentProcess     a command (`agent_process`)
    AgentFiles       files (`agent_files`), tar streams (`archive`)

An engine starts the agent in its own way and hands over the stream; what it knows better than the guest (why the
stream ended, how many processes the kernel killed for want of memory) it tells through `cause` and `oom_kills`.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from abyssal.sandbox import wire
from abyssal.sandbox.errors import AgentLost, Cause, Timeout, Unsupported
from abyssal.sandbox.wire import Decoder, Frame, Kind

READ_SIZE = 1 << 18


@dataclass(frozen=True)
class User:
    """Who a command runs as, as seen inside."""

    name: str
    uid: int
    gid: int
    home: str


USERS: Mapping[str, User] = {
    "root": User("root", 0, 0, "/root"),
    "user": User("user", 1000, 1000, "/home/user"),
}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# what makes two runs of the same commands alike (sandbox.md 6)
STEADY: Mapping[str, str] = {"PATH": PATH, "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}


def user_named(name: str) -> User:
    """One of the two users that every sandbox has.

    Raises:
        Unsupported: another name.
    """
    if name not in USERS:
        raise Unsupported(f"no user {name!r} in sandboxes: choose one of {', '.join(USERS)}")
    return USERS[name]


@dataclass(frozen=True)
class Hello:
    """What a guest is told at its start, and again after a restore or fork.

    Attributes:
        hostname: its name.
        user: whose rights file operations have, and commands that name no other.
        cwd: folder in which commands begin; made if it is missing.
        env: of every command, above what makes runs steady.
        seed: for its random numbers.
        machine_id: its identity, another one for each incarnation.
        token: by which it knows a host that takes over the stream from one that died; empty where none will.
    """

    hostname: str
    user: str = "user"
    cwd: str = "/work"
    env: Mapping[str, str] = field(default_factory=dict)
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    machine_id: str = field(default_factory=lambda: secrets.token_hex(16))
    token: bytes = b""

    def payload(self) -> bytes:
        """As fields."""
        user = user_named(self.user)
        env = {**STEADY, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, **self.env}
        items: list[tuple[str, object]] = [
            ("version", wire.VERSION),
            ("seed", self.seed.hex()),
            ("hostname", self.hostname),
            ("machine_id", self.machine_id),
            ("time_ns", time.time_ns()),
            ("uid", user.uid),
            ("gid", user.gid),
            ("cwd", self.cwd),
            ("token", self.token.hex()),
        ]
        return wire.fields([*items, *(("env", f"{key}={value}") for key, value in env.items())])


class Agent:
    """A guest agent at the other end of a stream.

    Args:
        reader, writer: the stream.
        first: number of the first operation; in a copy of a guest, above those that still run there.
        hello: what it was told already.
        behind: what comes up to and with these bytes is passed over: it was meant for another.

    Attributes:
        lost: whether the stream has ended.
        cause: asked for the reason when the stream has ended.
        oom_kills: how many processes of the sandbox the kernel killed for want of memory, where the host can tell.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: int = 1,
        hello: Hello | None = None,
        behind: bytes = b"",
    ):
        self._reader, self._writer = reader, writer
        self._ops: dict[int, asyncio.Queue[Frame | None]] = {}
        self._numbers = itertools.count(first)
        self._hello = hello
        self._behind = behind
        self.lost = False
        self.cause: Callable[[], Cause] = lambda: "unknown"
        self.oom_kills: Callable[[], int] = lambda: 0
        self._first: asyncio.Future[Frame | None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._receive())

    @classmethod
    async def rejoin(cls, stream: socket.socket, hello: Hello, first: int) -> Agent:
        """An agent whose host died; it says its first word again as soon as it can.

        Args:
            stream: that led to it.
            hello: what it was told, with its token.
            first: number of the first operation, above all that it was ever given.
        """
        mark = secrets.token_bytes(wire.MARK_SIZE)
        reader, writer = await asyncio.open_connection(sock=stream)
        agent = cls(reader, writer, first, hello, behind=hello.token + mark)
        writer.write(hello.token + mark)  # nobody waits for it to be read: the sandbox may be paused
        return agent

    @property
    def descriptor(self) -> int:
        """Of the stream."""
        return int(self._writer.get_extra_info("socket").fileno())

    @property
    def greeting(self) -> Hello:
        """What it was told last."""
        if self._hello is None:
            raise RuntimeError("the agent has not been greeted")
        return self._hello

    async def hello(self, hello: Hello, timeout: float) -> Mapping[str, str]:
        """Greet it and wait for its answer.

        Returns:
            what it says of itself: version, pid, uid, kernel, arch.
        Raises:
            Timeout, AgentLost: there was none.
            Unsupported: it speaks another version.
        """
        async with self.operation() as (op, frames):
            await self.send(Kind.HELLO, op, hello.payload())
            try:
                async with asyncio.timeout(timeout):
                    answer = await self.next(frames)
            except TimeoutError as error:
                raise Timeout(f"nobody answered inside the sandbox within {timeout:g} s") from error
        about = answer.values()
        if answer.kind != Kind.READY or about.get("version") != str(wire.VERSION):
            raise Unsupported(f"the guest agent speaks version {about.get('version')}, not {wire.VERSION}")
        self._hello = hello
        return about

    async def first(self) -> Mapping[str, str] | None:
        """What it says unasked when it begins; None where the stream ended instead."""
        frame = await self._first
        return frame.values() if frame else None

    async def sync(self) -> None:
        """Have all that the guest has written be on its disk."""
        async with self.operation() as (op, frames):
            await self.send(Kind.SYNC, op)
            await self.next(frames)

    async def bye(self) -> None:
        """Tell it to end; does not wait for it."""
        if not self.lost:
            with suppress(AgentLost):
                await self.send(Kind.BYE, 0)

    async def close(self) -> None:
        """Let go of the stream; everybody who waits gets `AgentLost`."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._end()

    # below: for the parts of the client

    @asynccontextmanager
    async def operation(self) -> AsyncIterator[tuple[int, asyncio.Queue[Frame | None]]]:
        """A number and the frames that come for it."""
        op, frames = self.begin()
        try:
            yield op, frames
        finally:
            self.forget(op)

    def begin(self) -> tuple[int, asyncio.Queue[Frame | None]]:
        """The same without an end; see `forget`."""
        op = next(self._numbers)
        frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._ops[op] = frames
        if self.lost:
            frames.put_nowait(None)
        return op, frames

    def join(self, number: int) -> asyncio.Queue[Frame | None] | None:
        """Frames of an operation that the guest began; None where it gave a number that is in use."""
        if number in self._ops or self.lost:
            return None
        self._ops[number] = asyncio.Queue()
        return self._ops[number]

    def forget(self, op: int) -> None:
        """Nobody waits for its frames any more."""
        self._ops.pop(op, None)

    async def send(self, kind: Kind, op: int, data: bytes = b"") -> None:
        """Send a frame; waits while the guest is behind.

        Raises:
            AgentLost: nobody is there.
        """
        if self.lost:
            raise self.why_lost()
        try:
            self._writer.write(wire.encode(kind, op, data))
            await self._writer.drain()
        except OSError as error:
            raise self.why_lost() from error

    async def next(self, frames: asyncio.Queue[Frame | None]) -> Frame:
        """The next frame of an operation.

        Raises:
            AgentLost: none will come.
        """
        frame = await frames.get()
        if frame is None:
            frames.put_nowait(None)
            raise self.why_lost()
        return frame

    def why_lost(self) -> AgentLost:
        """The error to raise."""
        cause = self.cause()
        words = {"oom": "the kernel killed it for want of memory", "killed": "it was stopped or killed"}
        words["guest-panic"] = "the guest's kernel panicked"
        return AgentLost(cause, f"nobody answers inside the sandbox: {words.get(cause, 'the reason is not known')}")

    async def _receive(self) -> None:
        decoder = Decoder()
        try:
            data = await self._pass_over()
            while data or (data := await self._reader.read(READ_SIZE)):
                for frame in decoder.feed(data):
                    if frame.kind == Kind.READY and not self._first.done():
                        self._first.set_result(frame)
                    if frame.op in self._ops:
                        self._ops[frame.op].put_nowait(frame)
                data = b""
        except (OSError, ValueError):
            pass
        finally:
            self._end()

    async def _pass_over(self) -> bytes:
        """Read past what was meant for another; returns what came behind it."""
        seen, wanted = b"", self._behind
        while wanted not in seen:
            data = await self._reader.read(READ_SIZE)
            if not data:
                raise ConnectionResetError("the agent ended before it knew us")
            seen = seen[-len(wanted) :] + data
        return seen.partition(wanted)[2] if wanted else b""

    def _end(self) -> None:
        self.lost = True
        if not self._first.done():
            self._first.set_result(None)
        self._writer.close()
        for frames in self._ops.values():
            frames.put_nowait(None)


def split(data: bytes, size: int) -> Sequence[memoryview]:
    """Pieces of at most a size."""
    view = memoryview(data)
    return [view[at : at + size] for at in range(0, len(view), size)]
