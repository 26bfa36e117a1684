"""Output of a command that runs, on the disk while its result is not: the next edge of this host goes on behind it.

Beyond the cap nothing is written: an edge that takes over has the beginning of such a stream, and its end from then on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from abyssal.sandbox.log.records import sha256

STREAMS = ("stdout", "stderr")


def name_of(op_id: str) -> str:
    """What an operation is called inside and in file names; callers give it any name."""
    return sha256(op_id.encode())[:32]


class Spill:
    """Both streams of one command.

    Args:
        folder: of all such files; made if missing.
        name: of the command.
        cap: bytes of each stream.
    """

    def __init__(self, folder: Path, name: str, cap: int):
        self._folder, self._name, self._cap = folder, name, cap
        self._files: dict[str, BinaryIO] = {}

    def _path(self, stream: str) -> Path:
        return self._folder / f"{self._name}.{stream}"

    def add(self, stream: str, data: bytes) -> None:
        """Bytes that came. A disk that is full costs what follows, not the command."""
        with suppress(OSError):
            if stream not in self._files:
                self._folder.mkdir(exist_ok=True, mode=0o700)
                self._files[stream] = open(self._path(stream), "ab", buffering=0)  # noqa: SIM115
            file = self._files[stream]
            if (room := self._cap - file.tell()) > 0:
                file.write(data[:room])

    def read(self, stream: str) -> bytes:
        """What was written."""
        try:
            return self._path(stream).read_bytes()
        except OSError:
            return b""

    def remove(self) -> None:
        """The result is kept."""
        for file in self._files.values():
            file.close()
        for stream in STREAMS:
            self._path(stream).unlink(missing_ok=True)
