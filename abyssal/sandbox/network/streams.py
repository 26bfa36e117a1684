"""The host's side of connections that a guest agent holds, with credit both ways (`guest/streams.c`).

Neither side keeps more of a connection than a window: the guest reads from a program what was granted, and a guest
that sends more than that, or opens more than it may, is not believed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from abyssal.sandbox import wire
from abyssal.sandbox.agent import Agent, split
from abyssal.sandbox.api import Duplex
from abyssal.sandbox.errors import AgentLost, NotFound, Timeout, Unsupported
from abyssal.sandbox.wire import Frame, Kind

CONNECT_S = 15.0


class Stream:
    """A connection that a guest agent holds; see `Duplex`."""

    def __init__(self, agent: Agent, op: int, frames: asyncio.Queue[Frame | None]):
        self._agent, self._op = agent, op
        self._room, self._granted, self._read = wire.STREAM_WINDOW, wire.STREAM_WINDOW, 0
        self._came = bytearray()
        self._all_came = False
        self._broken: str | None = None
        self._finished = self._closed = False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._sort(frames))

    async def begin(self) -> None:
        """Let the guest read from it."""
        await self._tell(Kind.GRANT, wire.fields([("bytes", wire.STREAM_WINDOW)]))

    async def _sort(self, frames: asyncio.Queue[Frame | None]) -> None:
        while self._broken is None:
            frame = await frames.get()
            if frame is None:
                self._broken = "the sandbox is gone"
            elif frame.kind == Kind.RECEIVED:
                self._granted -= len(frame.data)
                if self._granted < 0:
                    self._broken = "the guest sent more than it was granted"
                else:
                    self._came += frame.data
            elif frame.kind == Kind.FINISHED:
                self._all_came = True
            elif frame.kind == Kind.TAKEN:
                self._room = min(self._room + _number(frame, "bytes"), wire.STREAM_WINDOW)
            elif frame.kind == Kind.DROPPED:
                self._broken = frame.values().get("text", "it broke")
            self._news.set()
        self._agent.forget(self._op)

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _check(self) -> None:
        if self._closed or self._broken is not None:
            raise ConnectionResetError(f"the connection inside has ended: {self._broken or 'it was closed'}")

    async def read(self) -> bytes:
        while not self._came:
            if self._all_came and not self._closed:
                return b""
            self._check()
            await self._wait()
        data = bytes(self._came)
        self._came.clear()
        self._read += len(data)
        if self._read >= wire.STREAM_WINDOW // 2:
            self._granted += self._read
            await self._tell(Kind.GRANT, wire.fields([("bytes", self._read)]))
            self._read = 0
        return data

    async def write(self, data: bytes) -> None:
        for piece in split(data, wire.STREAM_WINDOW // 2):
            self._check()
            while self._room < len(piece):
                await self._wait()
                self._check()
            self._room -= len(piece)
            await self._tell(Kind.SEND, bytes(piece))

    async def finish(self) -> None:
        if not self._finished and not self._closed and self._broken is None:
            self._finished = True
            await self._tell(Kind.FINISH)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._news.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._agent.forget(self._op)
        if not self._agent.lost:
            with suppress(AgentLost):
                await self._agent.send(Kind.DROP, self._op)

    async def _tell(self, kind: Kind, data: bytes = b"") -> None:
        try:
            if self._broken is None:
                await self._agent.send(kind, self._op, data)
        except AgentLost as error:
            raise ConnectionResetError(str(error)) from None


async def connect(agent: Agent, port: int) -> Stream:
    """A connection to a port inside, on its loopback.

    Raises:
        NotFound: nobody listens there.
        Timeout: it does not answer, as one that is paused.
        AgentLost: the sandbox is gone.
    """
    op, frames = agent.begin()
    try:
        await agent.send(Kind.CONNECT, op, wire.fields([("port", port)]))
        async with asyncio.timeout(CONNECT_S):
            answer = await agent.next(frames)
        if answer.kind != Kind.OK:
            raise NotFound(f"port {port} cannot be reached in the sandbox: {answer.values().get('text', '')}")
    except BaseException as error:
        agent.forget(op)
        if not agent.lost:
            await agent.send(Kind.DROP, op)
        if isinstance(error, TimeoutError):
            raise Timeout(f"port {port} of the sandbox did not answer within {CONNECT_S:g} s") from None
        raise
    stream = Stream(agent, op, frames)
    try:
        await stream.begin()
    except ConnectionError:
        await stream.close()
        raise agent.why_lost() from None
    return stream


class Listener:
    """A port inside whose connections come to the host.

    Attributes:
        port: inside.
    """

    def __init__(self, agent: Agent, op: int, frames: asyncio.Queue[Frame | None], port: int):
        self.port = port
        self._agent, self._op, self._frames = agent, op, frames
        self._serving: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, agent: Agent, wanted: int) -> Listener:
        """Listen on a port inside, or on another where a program has taken that one.

        Raises:
            Unsupported: neither can be had.
            Timeout: the sandbox does not answer, as one that is paused.
            AgentLost: the sandbox is gone.
        """
        op, frames = agent.begin()
        said: dict[str, str] = {}
        try:
            for port in (wanted, 0):
                await agent.send(Kind.LISTEN, op, wire.fields([("port", port)]))
                async with asyncio.timeout(CONNECT_S):
                    answer = await agent.next(frames)
                said = answer.values()
                if answer.kind == Kind.OK:
                    return cls(agent, op, frames, int(said["port"]))
        except TimeoutError:
            agent.forget(op)
            raise Timeout(f"the sandbox did not answer within {CONNECT_S:g} s: is it paused?") from None
        except BaseException:
            agent.forget(op)
            raise
        agent.forget(op)
        raise Unsupported(f"no port can be listened on inside the sandbox: {said.get('text', 'nobody says why')}")

    def serve(self, handle: Callable[[Stream], Awaitable[None]]) -> None:
        """Hand every connection to a function, which may raise what a `Duplex` raises; it is closed afterwards."""
        self._task = asyncio.create_task(self._accept(handle))

    async def _accept(self, handle: Callable[[Stream], Awaitable[None]]) -> None:
        while frame := await self._frames.get():
            if frame.kind != Kind.ACCEPTED:
                continue
            number = _number(frame, "stream")
            # the guest's own numbers only: nobody takes over an operation of the host's
            if not wire.GUEST_NUMBERS <= number < 2 * wire.GUEST_NUMBERS or len(self._serving) >= wire.STREAMS_MOST:
                continue
            if (joined := self._agent.join(number)) is None:
                continue
            task = asyncio.create_task(_serve(Stream(self._agent, number, joined), handle))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def end_connections(self) -> None:
        """End those that are open; new ones are still accepted."""
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def close(self) -> None:
        """End all."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.end_connections()
        self._agent.forget(self._op)


async def _serve(stream: Stream, handle: Callable[[Stream], Awaitable[None]]) -> None:
    try:
        await stream.begin()
        await handle(stream)
    except ConnectionError:
        pass
    finally:
        await stream.close()


def _number(frame: Frame, key: str) -> int:
    """A field of a guest's, which may be anything."""
    text = frame.values().get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


async def join(one: Duplex, other: Duplex) -> None:
    """Carry bytes both ways until both sides have finished, or one broke."""
    ways = [asyncio.create_task(_carry(one, other)), asyncio.create_task(_carry(other, one))]
    try:
        await asyncio.gather(*ways)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _carry(source: Duplex, sink: Duplex) -> None:
    while data := await source.read():
        await sink.write(data)
    await sink.finish()
