"""What a sandbox hands out: results, running commands, sessions, terminals, files."""

from __future__ import annotations

import asyncio
import io
import shlex
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from abyssal.sandbox import shapes
from abyssal.sandbox.api import Boundary, ProcessEvent, Stat, Usage, shell
from abyssal.sandbox.errors import LimitHit, NotFound
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.perform import READ_CAP
from abyssal.sandbox.service import Answer, Begun, Service

WATCH_S = 0.5


@dataclass(frozen=True)
class Result:
    """How a command ended.

    Attributes:
        exit_code: 128 and the signal's number where a signal ended it.
        stdout, stderr: bytes; of long output the beginning and the end.
        truncated: whether the middle of either is missing.
        signal, timed_out, duration_ms, usage: see `Exit`.
        op_id, seq: of the operation in the log.
        replayed: nothing ran, the log answered.
        boundary: what held it in; "process" is no sandbox.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    signal: int | None
    timed_out: bool
    duration_ms: int
    usage: Usage
    op_id: str
    seq: int
    replayed: bool
    boundary: Boundary

    @property
    def text(self) -> str:
        """stdout, decoded; what is no UTF-8 shows as such."""
        return self.stdout.decode(errors="replace")


def result(answer: Answer, boundary: Boundary) -> Result:
    """The result of a command's operation.

    Raises:
        LimitHit: a limit of the sandbox ended it.
    """
    ended = shapes.exit_of(answer.res)
    if ended.limit is not None:
        limit: Any = ended.limit
        raise LimitHit(limit, f"the {limit} limit of the sandbox ended operation {answer.op_id}")
    out, err = answer.streams["stdout"], answer.streams["stderr"]
    return Result(
        ended.code, out.data, err.data, out.truncated or err.truncated, ended.signal, ended.timed_out,
        ended.duration_ms, ended.usage, answer.op_id, answer.seq, answer.replayed, boundary,
    )  # fmt: skip


class Owner(Protocol):
    """What handles need of their sandbox."""

    id: str

    @property
    def service(self) -> Service: ...

    @property
    def boundary(self) -> Boundary: ...

    def asked(self, op_id: str | None = None) -> Asked: ...

    async def call(self, req: dict[str, Any], *, op_id: str | None = None, data: bytes | None = None) -> Answer: ...


class Running:
    """A command that runs, or ran; it belongs to the sandbox and goes on without anybody waiting."""

    def __init__(self, owner: Owner, begun: Begun):
        self._owner, self._begun = owner, begun
        self.op_id = begun.op_id

    async def wait(self) -> Result:
        """How it ended.

        Raises:
            LimitHit: a limit ended it.
            AgentLost: the sandbox ended first.
        """
        return result(await self._owner.service.result(self._owner.id, self._begun), self._owner.boundary)

    def events(self, stdout: int = 0, stderr: int = 0) -> AsyncIterator[ProcessEvent]:
        """Output from these offsets on, then `Exit`."""
        return self._owner.service.events(self._owner.id, self.op_id, stdout, stderr)

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Feed its standard input; it was started with `stdin=True`."""
        await self._owner.call({"op": "stdin", "of": self.op_id, "end": end}, data=data)

    async def signal(self, number: int) -> None:
        """Send its process group a signal; 9 goes to all that it started."""
        await self._owner.call({"op": "signal", "of": self.op_id, "signal": number})


class Terminal(Running):
    """A terminal with a program in it."""

    async def send(self, data: bytes) -> None:
        """Type."""
        await self._owner.service.type(self._owner.id, self.op_id, data)

    async def resize(self, rows: int, columns: int) -> None:
        """Another size."""
        await self._owner.call({"op": "resize", "of": self.op_id, "rows": rows, "columns": columns})


# What a session keeps lies in a file, written by the shell itself as it ends: so every command is an operation of its
# own, with an exit code that no output can forge, and a timeout ends all its processes without ending the session.
_SESSION = """\
__s=$1 __t=$2; set --
if [ -f "$__s" ]; then . "$__s"; __o=$OLDPWD; cd -- "$PWD"; OLDPWD=$__o; fi
export PWD OLDPWD
trap '__c=$?; export -p | sed "/^export ABYSSAL_/d" > "$__s.new" && mv "$__s.new" "$__s"; exit $__c' EXIT
eval "$__t"
"""


class Session:
    """A shell that keeps its folder and exported variables from one command to the next."""

    def __init__(self, run: Callable[..., Awaitable[Result]], name: str):
        self._run, self._name = run, name
        self._turn = asyncio.Lock()

    async def run(self, text: str, *, timeout: float | None = None, op_id: str | None = None) -> Result:
        """Run a text in it; commands of one session run one after another."""
        wrapped = f'set -- "${{TMPDIR:-/tmp}}/.session-{self._name}" {shlex.quote(text)}\n{_SESSION}'
        async with self._turn:
            return await self._run(shell(wrapped), timeout=timeout, op_id=op_id)


class SandboxFiles:
    """Files inside; paths are absolute there or relative to the sandbox's folder."""

    def __init__(self, owner: Owner):
        self._owner = owner

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file."""
        pieces = []
        while length is None or length > 0:
            part = READ_CAP if length is None else min(length, READ_CAP)
            answer = await self._owner.call({"op": "file.read", "path": path, "offset": offset, "length": part})
            data = answer.streams["data"].data
            pieces.append(data)
            offset += len(data)
            length = None if length is None else length - len(data)
            if len(data) < part:
                break
        return b"".join(pieces)

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """The whole file; missing folders are made."""
        await self._owner.call({"op": "file.write", "path": path, "mode": mode}, data=data)

    async def stat(self, path: str) -> Stat:
        """Facts of a file, a link itself and not what it leads to."""
        return shapes.stat((await self._owner.call({"op": "file.stat", "path": path})).res["value"])

    async def list(self, path: str = ".") -> Sequence[Stat]:
        """What a folder holds, sorted by name."""
        answer = await self._owner.call({"op": "file.list", "path": path})
        return [shapes.stat(entry) for entry in answer.res["value"]]

    async def make_folder(self, path: str) -> None:
        """A folder, and those above it."""
        await self._owner.call({"op": "file.make_folder", "path": path})

    async def move(self, path: str, to: str) -> None:
        """Another name."""
        await self._owner.call({"op": "file.move", "path": path, "to": to})

    async def remove(self, path: str) -> None:
        """A file, or a folder and all in it."""
        await self._owner.call({"op": "file.remove", "path": path})

    async def upload_tree(self, local: Path, path: str) -> None:
        """Copy a folder of this machine into one inside."""
        await self._owner.call({"op": "file.upload", "path": path}, data=await asyncio.to_thread(_pack, local))

    async def download_tree(self, path: str, local: Path) -> None:
        """Copy a folder from inside into one of this machine; nothing is written outside of it."""
        answer = await self._owner.call({"op": "file.download", "path": path})
        await asyncio.to_thread(_unpack, answer.streams["data"].data, local)

    async def watch(self, path: str = ".", every: float = WATCH_S) -> AsyncIterator[tuple[str, str]]:
        """Changes in a folder as they are seen: ("added" | "changed" | "removed", path). It is polled, not in the log's
        way of counting operations, so a client that comes back begins a new watch."""
        seen = await self._look(path)
        while True:
            await asyncio.sleep(every)
            now = await self._look(path)
            for name in sorted(seen.keys() | now.keys()):
                if name not in seen:
                    yield "added", name
                elif name not in now:
                    yield "removed", name
                elif seen[name] != now[name]:
                    yield "changed", name
            seen = now

    async def _look(self, path: str) -> dict[str, tuple[int, float, int]]:
        req = {"op": "file.list", "path": path}
        try:
            answer = await self._owner.service.call(self._owner.id, req, Asked())
        except NotFound:
            return {}
        return {entry["path"]: (entry["size"], entry["mtime"], entry["mode"]) for entry in answer.res["value"]}


def _pack(local: Path) -> bytes:
    """A folder as a tar that depends on names and contents alone, so that asking again is the same request."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid, member.gid, member.uname, member.gname, member.mtime = 0, 0, "", "", 0
        return member

    if not local.is_dir():
        raise NotFound(f"no folder {local} on this machine")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(local, ".", filter=plain)
    return buffer.getvalue()


def _unpack(data: bytes, local: Path) -> None:
    local.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(local, filter="data")
