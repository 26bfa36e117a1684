"""Trees as tar streams, in and out of a sandbox; what is in a stream from elsewhere is checked member by member."""

from __future__ import annotations

import asyncio
import io
import posixpath
import tarfile
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Literal, Protocol, TypeVar

from abyssal.sandbox.api import Stat
from abyssal.sandbox.errors import PathError

BLOCK = tarfile.BLOCKSIZE
PART = 1 << 18
T = TypeVar("T")


class Tree(Protocol):
    """What is needed of files; `AgentFiles` has it."""

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes: ...
    async def write_stream(
        self, path: str, parts: AsyncIterator[bytes], mode: int = 0o644, mtime: float = -1
    ) -> None: ...
    async def stat(self, path: str) -> Stat: ...
    async def list(self, path: str) -> Any: ...
    async def make_folder(self, path: str, mode: int = 0o755) -> None: ...
    async def link(self, path: str, target: str, kind: Literal["sym", "hard"]) -> None: ...


def member_name(info: tarfile.TarInfo) -> str:
    """Where a member goes, relative to the folder that it is unpacked into.

    Raises:
        PathError: it would leave that folder, or is of a kind that does not travel.
    """
    name = _inside(info.name, info.name)
    if info.issym():
        _inside(posixpath.join(posixpath.dirname(name), info.linkname), info.name, absolute=info.linkname)
    elif info.islnk():
        _inside(info.linkname, info.name)
    elif not (info.isreg() or info.isdir()) or info.issparse():
        raise PathError(f"the archive's {info.name!r} is no plain file, folder or link: leave it out")
    return name


def _inside(path: str, member: str, absolute: str = "") -> str:
    plain = posixpath.normpath(path)
    if path.startswith("/") or absolute.startswith("/") or plain == ".." or plain.startswith("../") or "\0" in path:
        raise PathError(f"the archive's {member!r} would leave the folder that it is unpacked into")
    return plain


async def unpack(files: Tree, folder: str, tar: AsyncIterator[bytes]) -> None:
    """Unpack an uncompressed tar stream; what came before a refused member stays.

    Raises:
        PathError: a member that `member_name` refuses, or no tar stream.
    """
    loop = asyncio.get_running_loop()
    await files.make_folder(folder)
    await asyncio.to_thread(_unpack, files, folder, _Pulled(tar, loop), loop)


class _Pulled(io.RawIOBase):
    """An asynchronous stream as a file that a thread reads."""

    def __init__(self, parts: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop):
        self._parts, self._loop, self._rest = aiter(parts), loop, memoryview(b"")

    async def _pull(self) -> bytes:
        return await anext(self._parts, b"")

    def read(self, size: int = -1, /) -> bytes:
        if not self._rest:
            self._rest = memoryview(asyncio.run_coroutine_threadsafe(self._pull(), self._loop).result())
        size = len(self._rest) if size < 0 else size
        part, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return part


def _unpack(files: Tree, folder: str, stream: _Pulled, loop: asyncio.AbstractEventLoop) -> None:
    def do(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                path = f"{folder}/{member_name(info)}"
                if info.isdir():
                    do(files.make_folder(path, info.mode & 0o777 | 0o700))
                elif info.issym():
                    do(files.link(path, info.linkname, "sym"))
                elif info.islnk():
                    do(files.link(path, f"{folder}/{posixpath.normpath(info.linkname)}", "hard"))
                else:
                    content = archive.extractfile(info)
                    assert content is not None
                    do(files.write_stream(path, _parts(content), info.mode & 0o777, float(info.mtime)))
    except tarfile.TarError as error:
        raise PathError(f"what is to be unpacked into {folder!r} is no tar stream: {error}") from error


async def _parts(content: Any) -> AsyncIterator[bytes]:
    while part := await asyncio.to_thread(content.read, PART):
        yield part


async def pack(files: Tree, folder: str) -> AsyncIterator[bytes]:
    """A folder as a tar stream: names sorted, owners left out."""
    pending = [(await files.stat(folder), ".")]
    while pending:
        at, name = pending.pop()
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = at.mode, int(at.mtime)
        if at.kind == "folder":
            info.type = tarfile.DIRTYPE
            below = list(await files.list(at.path))
            above = "" if name == "." else name
            pending += [(each, posixpath.join(above, posixpath.basename(each.path))) for each in reversed(below)]
        elif at.kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, at.target
        elif at.kind == "file":
            info.size = at.size
        else:
            continue
        yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        left = info.size
        while left:
            part = await files.read(at.path, info.size - left, min(left, PART))
            part = part or bytes(min(left, PART))  # it has become shorter meanwhile
            left -= len(part)
            yield part
        yield bytes(-info.size % BLOCK)
    yield bytes(2 * BLOCK)
