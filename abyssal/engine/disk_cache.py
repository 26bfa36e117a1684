"""Entries on disk that several processes may share: content-addressed, checksummed, within a size.

A file is written aside and renamed, so a reader sees a whole file or none. What a crash leaves of a file that
the system had not written yet fails its checksum. So at worst an entry is missing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from abyssal.base.errors import InputError
from abyssal.kvcache.image import from_bytes, to_bytes

ABANDONED_S = 3600.0  # a file aside that is older belongs to a process that died
SUFFIX = ".kv"


@dataclass(frozen=True)
class Found:
    """An entry, or why there is none."""

    tensors: list[Tensor] | None
    reason: str = ""


class DiskCache:
    """A folder of entries, each under a key in hexadecimal.

    Args:
        folder: made if it is not there.
        budget: bytes that the entries may take; the ones used longest ago go first.

    Raises:
        InputError: the folder cannot be made or is not ours to write.
    """

    def __init__(self, folder: Path | str, budget: int):
        self.folder = Path(folder)
        self.budget = budget
        self.problem: str | None = None  # the last thing that went wrong while writing
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._bytes = 0
            for path in self._files():
                with contextlib.suppress(OSError):
                    self._bytes += path.stat().st_size
            self._sweep()
        except OSError as error:
            raise InputError(f"{self.folder} cannot hold a cache: {error.strerror}; choose another folder") from None

    def _files(self) -> Iterable[Path]:
        return self.folder.glob(f"??/*{SUFFIX}")

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _sweep(self) -> None:
        old = time.time() - ABANDONED_S
        for path in self.folder.glob("??/.*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old:
                    path.unlink()

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def put(self, key: str, tensors: list[Tensor]) -> None:
        """Keep an entry; what goes wrong is noted in `problem`, since a cache may always forget."""
        path = self._path(key)
        if path.exists():
            return
        data = to_bytes(tensors, {"key": key})
        if len(data) > self.budget:
            return
        self._make_room(len(data))
        aside = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=".", dir=path.parent)
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(aside, path)
            self._bytes += len(data)
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror}"
            if aside is not None:
                with contextlib.suppress(OSError):
                    os.unlink(aside)

    def get(self, key: str) -> Found:
        """An entry; a damaged one is removed."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return Found(None, "not on disk")
        except OSError as error:
            return Found(None, f"the disk did not read it ({error.strerror})")
        try:
            tensors, facts = from_bytes(data)
            if facts.get("key") != key:
                raise ValueError("it lies under another key")
        except ValueError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            return Found(None, f"its file was damaged ({error})")
        return Found(tensors)

    def touch(self, keys: Iterable[str]) -> None:
        """Entries of a prefix in use, first page first; the first ones are to go last."""
        now = time.time()
        for back, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self._path(key), (now, now - back * 1e-3))

    def _make_room(self, size: int) -> None:
        if self._bytes + size <= self.budget:
            return
        known: list[tuple[float, int, Path]] = []
        for path in self._files():
            with contextlib.suppress(OSError):  # another process may have removed it
                facts = path.stat()
                known.append((facts.st_mtime, facts.st_size, path))
        self._bytes = sum(entry[1] for entry in known)
        # down to nine tenths, so that not every entry needs a walk through the folder
        for _, length, path in sorted(known):
            if self._bytes + size <= 0.9 * self.budget:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                self._bytes -= length

    def clear(self) -> None:
        """Remove every entry."""
        for path in self._files():
            with contextlib.suppress(OSError):
                path.unlink()
        self._bytes = 0

    @property
    def count(self) -> int:
        """Entries there are."""
        return sum(1 for _ in self._files())

    @property
    def bytes(self) -> int:
        """Bytes of the entries, as far as this process knows."""
        return self._bytes
