"""Files of a sandbox through its guest agent."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from abyssal.sandbox import archive, wire
from abyssal.sandbox.agent import Agent, split
from abyssal.sandbox.api import Stat
from abyssal.sandbox.errors import LimitHit, NotFound, PathError, SandboxError
from abyssal.sandbox.wire import Frame, Kind

LARGEST = 1 << 28  # bytes read in one call; a file inside may claim to be of any size
MOST = 100_000  # names in a folder
_KINDS: dict[str, Literal["file", "folder", "link", "other"]] = {"f": "file", "d": "folder", "l": "link"}


class AgentFiles:
    """See `Files`; what the sandbox's user may not do, these may not."""

    def __init__(self, agent: Agent):
        self._agent = agent

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        if (LARGEST if length is None else length) > LARGEST:
            raise PathError(f"{path}: {length} bytes at once; read at most {LARGEST}, in parts")
        parts: list[bytes] = []
        got, end = 0, LARGEST if length is None else length
        while got < end:
            size = min(end - got, wire.READ_MOST)
            part = (await self._ask(Kind.READ, path, ("offset", offset + got), ("length", size))).data
            parts.append(part)
            got += len(part)
            if len(part) < size:
                break
        else:
            if length is None:
                raise PathError(f"{path} is larger than {LARGEST} bytes: read it in parts")
        return b"".join(parts)

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        async def once() -> AsyncIterator[bytes]:
            yield data

        await self.write_stream(path, once(), mode)

    async def write_stream(self, path: str, parts: AsyncIterator[bytes], mode: int = 0o644, mtime: float = -1) -> None:
        """The whole file from parts, aside and then renamed."""
        agent = self._agent
        stamp = [("mtime_ns", round(mtime * 1e9))] if mtime >= 0 else []
        head = _fields(("path", path), ("mode", f"{mode:o}"), *stamp)
        async with agent.operation() as (op, frames):
            await agent.send(Kind.WRITE, op, head)
            try:
                async for part in parts:
                    for piece in split(part, wire.READ_MOST):
                        if frames.empty():
                            await agent.send(Kind.CHUNK, op, bytes(piece))
                await agent.send(Kind.CLOSE, op)
            except BaseException:
                if not agent.lost:
                    await agent.send(Kind.ABORT, op)
                raise
            self._check(path, await agent.next(frames))

    async def stat(self, path: str) -> Stat:
        return _stat(path, (await self._ask(Kind.STAT, path)).values())

    async def list(self, path: str) -> Sequence[Stat]:
        agent = self._agent
        found: list[dict[str, str]] = []
        async with agent.operation() as (op, frames):
            await agent.send(Kind.LIST, op, _fields(("path", path), ("limit", MOST)))
            while (frame := self._check(path, await agent.next(frames))).kind == Kind.LISTED:
                for key, value in frame.fields():
                    if key == "name":
                        found.append({})
                    found[-1][key] = value
        if "more" in frame.values():
            raise PathError(f"{path} holds more than {MOST} names: list it with a command inside")
        found.sort(key=lambda each: os.fsencode(each["name"]))
        return [_stat(f"{path.rstrip('/')}/{each['name']}", each) for each in found]

    async def make_folder(self, path: str, mode: int = 0o755) -> None:
        await self._ask(Kind.MKDIR, path, ("mode", f"{mode:o}"))

    async def move(self, path: str, to: str) -> None:
        await self._ask(Kind.MOVE, path, ("to", to))

    async def remove(self, path: str) -> None:
        await self._ask(Kind.REMOVE, path)

    async def link(self, path: str, target: str, kind: Literal["sym", "hard"]) -> None:
        """A link at a path."""
        await self._ask(Kind.LINK, path, ("target", target), ("kind", kind))

    async def upload(self, path: str, tar: AsyncIterator[bytes]) -> None:
        await archive.unpack(self, path, tar)

    def download(self, path: str) -> AsyncIterator[bytes]:
        return archive.pack(self, path)

    async def _ask(self, kind: Kind, path: str, *items: tuple[str, object]) -> Frame:
        async with self._agent.operation() as (op, frames):
            await self._agent.send(kind, op, _fields(("path", path), *items))
            return self._check(path, await self._agent.next(frames))

    def _check(self, path: str, frame: Frame) -> Frame:
        if frame.kind == Kind.FAIL:
            raise _error(path, frame)
        return frame


def _fields(*items: tuple[str, object]) -> bytes:
    try:
        return wire.fields(items)
    except ValueError as error:
        raise PathError(str(error)) from error


def _stat(path: str, said: dict[str, str]) -> Stat:
    return Stat(
        path=path,
        kind=_KINDS.get(said["kind"], "other"),
        size=int(said["size"]),
        mode=int(said["mode"], 8),
        mtime=int(said["mtime_ns"]) / 1e9,
        target=said.get("target", ""),
    )


def _error(path: str, frame: Frame) -> SandboxError:
    said = frame.values()
    number, text = int(said.get("errno", 0)), said.get("text", "")
    if number == errno.ENOENT:
        return NotFound(f"no {path!r} in the sandbox")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return LimitHit("disk", f"{path!r} cannot be written: the sandbox's disk is full")
    if number == errno.EINVAL:
        return PathError(f"{path!r} is no regular file")
    return PathError(f"{path!r}: {text}")
