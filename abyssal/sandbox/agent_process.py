"""A command that a guest agent runs."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from abyssal.sandbox import wire
from abyssal.sandbox.agent import Agent, split, user_named
from abyssal.sandbox.api import Command, Exit, ProcessEvent, Stderr, Stdout, Usage
from abyssal.sandbox.errors import AgentLost, LimitHit, NotFound, PathError, SandboxError, Unsupported
from abyssal.sandbox.wire import Frame, Kind

WINDOW = 1 << 18  # bytes of output that may be on their way
BEGIN_S = 5.0


async def start(agent: Agent, command: Command, *, caps: bool = False) -> AgentProcess:
    """Run a program.

    Args:
        agent: greeted already.
        command: see there.
        caps: whether a command of root keeps the guest's capabilities (in machines of its own).
    Raises:
        NotFound, PathError: no such program or folder, or it may not be used.
        LimitHit: no process can be started any more.
        Unsupported: no such user.
        AgentLost: the sandbox is gone.
    """
    op, frames = agent.begin()
    before = agent.oom_kills()
    try:
        await agent.send(Kind.EXEC, op, _payload(agent, command, caps, before))
        answer = await agent.next(frames)
        if answer.kind != Kind.STARTED:
            raise _refusal(command, answer)
    except BaseException:
        agent.forget(op)
        raise
    return AgentProcess(agent, op, frames, int(answer.values()["pid"]), before)


@dataclass(frozen=True)
class LeftProcess:
    """A command that an earlier host began; see `Left`."""

    agent: Agent
    op: int
    pid: int
    oom_before: int
    stdout: int
    stderr: int
    fed: bool

    async def join(self, stdout: int, stderr: int) -> AgentProcess:
        frames = self.agent.join(self.op)
        if frames is None:
            raise self.agent.why_lost()
        at = {Kind.OUT: max(stdout, self.stdout), Kind.ERR: max(stderr, self.stderr)}
        process = AgentProcess(self.agent, self.op, frames, self.pid, self.oom_before, at)
        places = [("out", at[Kind.OUT]), ("err", at[Kind.ERR]), ("window", WINDOW)]
        await self.agent.send(Kind.JOIN, self.op, wire.fields(places))
        return process

    async def settle(self) -> None:
        with suppress(AgentLost):
            await self.agent.send(Kind.SETTLE, self.op)


async def left(agent: Agent) -> Mapping[str, LeftProcess]:
    """Commands with a name that run, or whose end nobody has settled.

    Raises:
        AgentLost: the sandbox is gone.
    """
    until = asyncio.get_running_loop().time() + BEGIN_S
    while True:
        found, begun = {}, True
        async with agent.operation() as (op, frames):
            await agent.send(Kind.RUNNING, op)
            while (frame := await agent.next(frames)).kind == Kind.OPERATION:
                said = frame.values()
                names = ("id", "pid", "before", "out", "err")
                op_id, pid, before, out, err = (int(said[name]) for name in names)
                found[said["name"]] = LeftProcess(agent, op_id, pid, before, out, err, said["fed"] != "0")
                begun = begun and said["begun"] != "0"
        if begun or asyncio.get_running_loop().time() > until:
            return found
        await asyncio.sleep(0.02)  # its program is about to run, or to be refused


def _payload(agent: Agent, command: Command, caps: bool, before: int) -> bytes:
    items: list[tuple[str, object]] = [("arg", argument) for argument in command.argv]
    env = dict(command.env)
    if command.user is not None and command.user != agent.greeting.user:
        user = user_named(command.user)
        items += [("uid", user.uid), ("gid", user.gid)]
        env = {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, **env}
    if command.tty is not None:
        items.append(("tty", f"{command.tty[0]},{command.tty[1]}"))
        env = {"TERM": "xterm-256color", **env}
    items += [("env", f"{key}={value}") for key, value in env.items()]
    items += [("cwd", command.cwd or agent.greeting.cwd), ("window", WINDOW)]
    if command.stdin:
        items.append(("stdin", 1))
    if command.keep:
        items.append(("keep", 1))
    if command.name:
        items += [("name", command.name), ("before", before)]
    if caps:
        items.append(("caps", 1))
    if command.timeout is not None:
        items.append(("timeout_ms", max(1, round(command.timeout * 1000))))
    return wire.fields(items)


def _refusal(command: Command, answer: Frame) -> SandboxError:
    said = answer.values()
    number, what, text = int(said.get("errno", 0)), said.get("what", ""), said.get("text", "")
    name = command.argv[0] if command.argv else ""
    if what == "process" or number == errno.EAGAIN:
        if number == errno.ENOMEM:
            return LimitHit("memory", f"{name!r} cannot be started: no memory is left in the sandbox")
        return LimitHit("pids", f"{name!r} cannot be started: the sandbox may have no more processes ({text})")
    if what == "user":
        return Unsupported(f"this sandbox cannot run commands as {command.user!r} ({text})")
    subject = f"folder {command.cwd!r}" if what == "cwd" else f"program {name!r}"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"no {subject} in the sandbox")
    return PathError(f"{subject} cannot be used: {text}")


class AgentProcess:
    """A program that runs inside; see `Process`."""

    def __init__(
        self,
        agent: Agent,
        op: int,
        frames: asyncio.Queue[Frame | None],
        pid: int,
        oom_before: int,
        joined: Mapping[Kind, int] | None = None,
    ):
        self.pid = pid
        self._offsets = {Kind.OUT: 0, Kind.ERR: 0} if joined is None else dict(joined)
        self._agent, self._op, self._frames, self._oom_before = agent, op, frames, oom_before
        self._input_left = wire.STDIN_WINDOW if joined is None else 0  # the guest says how much, when it is joined
        self._input_room = asyncio.Event()
        self._own: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._sort())

    async def _sort(self) -> None:
        """What was taken of the input is for `write`, all else for `events`, whoever reads first."""
        while frame := await self._frames.get():
            if frame.kind == Kind.TOOK:
                self._input_left += int(frame.values()["bytes"])
                self._input_room.set()
                continue
            self._own.put_nowait(frame)
            if frame.kind in (Kind.EXITED, Kind.FAIL):
                break
        self._agent.forget(self._op)
        self._own.put_nowait(None)
        self._input_left = 1 << 62  # what nobody reads any more goes nowhere
        self._input_room.set()

    async def events(self) -> AsyncIterator[ProcessEvent]:
        offsets, read = self._offsets, 0
        while True:
            frame = await self._agent.next(self._own)
            if frame.kind == Kind.EXITED:
                yield self._exit(frame)
                return
            kind = Kind(frame.kind)
            if kind not in offsets:
                continue
            event = Stdout if kind == Kind.OUT else Stderr
            yield event(frame.data, offsets[kind])
            offsets[kind] += len(frame.data)
            read += len(frame.data)
            if read >= WINDOW // 2:
                places = [("bytes", read), ("out", offsets[Kind.OUT]), ("err", offsets[Kind.ERR])]
                await self._tell(Kind.CREDIT, wire.fields(places))
                read = 0

    def _exit(self, frame: Frame) -> Exit:
        said = {key: int(value) for key, value in frame.values().items()}
        oom = said["oom"] > 0 or self._agent.oom_kills() > self._oom_before
        return Exit(
            code=said["code"],
            signal=said["signal"] or None,
            timed_out=bool(said["timed_out"]),
            limit="memory" if oom and said["code"] and not said["timed_out"] else None,
            duration_ms=said["ms"],
            usage=Usage(cpu_ms=said["cpu_ms"], peak_memory=said["peak"]),
        )

    async def write(self, data: bytes) -> None:
        for piece in split(data, wire.STDIN_WINDOW // 2):
            while self._input_left < len(piece):
                self._input_room.clear()
                await self._input_room.wait()
            self._input_left -= len(piece)
            await self._tell(Kind.STDIN, bytes(piece))

    async def close_stdin(self) -> None:
        await self._tell(Kind.EOF)

    async def signal(self, number: int) -> None:
        await self._tell(Kind.SIGNAL, wire.fields([("signal", number)]))

    async def resize(self, rows: int, columns: int) -> None:
        await self._tell(Kind.RESIZE, wire.fields([("tty", f"{rows},{columns}")]))

    async def settle(self) -> None:
        with suppress(AgentLost):
            await self._agent.send(Kind.SETTLE, self._op)

    async def _tell(self, kind: Kind, data: bytes = b"") -> None:
        if not self._task.done():
            await self._agent.send(kind, self._op, data)
