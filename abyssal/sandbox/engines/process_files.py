"""Files of a folder on the host as the contract's `Files`; for engine `process`."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from abyssal.base.errors import SaveError
from abyssal.base.files import write_bytes
from abyssal.sandbox.api import Stat
from abyssal.sandbox.errors import LimitHit, NotFound, PathError

CHUNK = 1 << 18
_KINDS: dict[int, Literal["file", "folder", "link", "other"]] = {
    stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"
}  # fmt: skip


class HostFiles:
    """`/work` and `/tmp` of a box are folders of `root`; relative paths begin in `/work`."""

    def __init__(self, root: Path):
        self.root = root

    def place(self, path: str, *, follow: bool = True) -> Path:
        """Where a path lies on the host.

        Raises:
            PathError: outside of the box.
        """
        if "\0" in path or not path:
            raise PathError(f"{path!r} is no path")
        full = Path(os.path.normpath(self.root / "work" / path)) if not path.startswith("/") else None
        if full is None:
            full = Path(os.path.normpath(str(self.root) + os.path.normpath(path)))
        real = full.resolve() if follow else full.parent.resolve() / full.name
        homes = [(self.root / name).resolve() for name in ("work", "tmp")]
        if not any(real == home or home in real.parents for home in homes):
            raise PathError(f"{path} lies outside of the sandbox's folders /work and /tmp")
        return real

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        def work() -> bytes:
            with _said(path), open(self.place(path), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise PathError(f"{path} is no file")
                file.seek(offset)
                return file.read(-1 if length is None else length)

        return await asyncio.to_thread(work)

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        def work() -> None:
            place = self.place(path)
            with _said(path):
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_dir():
                    raise PathError(f"{path} is a folder")
                write_bytes(place, data)
                place.chmod(mode)

        await asyncio.to_thread(work)

    async def stat(self, path: str) -> Stat:
        with _said(path):
            return _stat(path, self.place(path, follow=False))

    async def list(self, path: str) -> Sequence[Stat]:
        def work() -> Sequence[Stat]:
            with _said(path):
                place = self.place(path)
                return [_stat(f"{path.rstrip('/')}/{name}", place / name) for name in sorted(os.listdir(place))]

        return await asyncio.to_thread(work)

    async def make_folder(self, path: str) -> None:
        with _said(path):
            self.place(path).mkdir(parents=True, exist_ok=True)

    async def move(self, path: str, to: str) -> None:
        with _said(path):
            target = self.place(to, follow=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.place(path, follow=False), target)

    async def remove(self, path: str) -> None:
        def work() -> None:
            with _said(path):
                place = self.place(path, follow=False)
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                else:
                    place.unlink()

        await asyncio.to_thread(work)

    async def upload(self, path: str, tar: AsyncIterator[bytes]) -> None:
        with tempfile.TemporaryFile() as file:
            async for piece in tar:
                file.write(piece)
            file.seek(0)

            def work() -> None:
                with _said(path):
                    place = self.place(path)
                    place.mkdir(parents=True, exist_ok=True)
                    try:
                        with tarfile.open(fileobj=file) as archive:
                            archive.extractall(place, filter="data")
                    except tarfile.TarError as error:
                        raise PathError(f"the tar for {path} is refused: {error}") from None

            await asyncio.to_thread(work)

    async def download(self, path: str) -> AsyncIterator[bytes]:
        place = self.place(path)
        if not place.is_dir():
            raise NotFound(f"no folder {path}")
        with tempfile.TemporaryFile() as file:

            def work() -> None:
                with tarfile.open(fileobj=file, mode="w") as archive:
                    archive.add(place, ".")

            await asyncio.to_thread(work)
            file.seek(0)
            while piece := file.read(CHUNK):
                yield piece


def _stat(path: str, place: Path) -> Stat:
    found = place.lstat()
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "other")
    target = os.readlink(place) if kind == "link" else ""
    return Stat(path, kind, found.st_size, stat.S_IMODE(found.st_mode), found.st_mtime, target)


@contextmanager
def _said(path: str) -> Iterator[None]:
    """Errors of the system in the contract's words."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"no {path} in the sandbox") from None
    except SaveError as error:
        raise PathError(f"{path} cannot be written: {error}") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise LimitHit("disk", f"the disk is full: {path} was not written") from None
        raise PathError(f"{path}: {error.strerror}") from None
