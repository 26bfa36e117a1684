"""Read parts of files past the page cache, so that what is cached is what we cached.

The page cache would hold every expert a second time, grow without regard to a limit, and cost a copy of each byte.
File systems without direct reads (tmpfs) are read through it all the same.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from abyssal.base.errors import CheckpointError
from abyssal.checkpoint.shards import StoredTensor

PAGE = 4096  # what direct reads are a multiple of: place, size, and address in memory
NEIGHBOUR = 1 << 16  # bytes between two tensors up to which one read fetches both
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class DirectFiles:
    """Open files, and a buffer for each thread that reads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._own = threading.local()
        weakref.finalize(self, _close, self._open)

    def read(self, tensors: list[StoredTensor]) -> list[Tensor]:
        """Bytes of tensors, in this thread's buffer: good until it reads again.

        Those that lie close together are fetched in one read.

        Raises:
            CheckpointError: a file cannot be read, or ends too early.
        """
        order = sorted(range(len(tensors)), key=lambda i: (tensors[i].file, tensors[i].start))
        runs: list[list[int]] = []
        for i in order:
            last = tensors[runs[-1][-1]] if runs else None
            near = last is not None and last.file == tensors[i].file
            if near and last is not None and 0 <= tensors[i].start - last.start - last.nbytes <= NEIGHBOUR:
                runs[-1].append(i)
            else:
                runs.append([i])
        spans = []
        for run in runs:
            first, last = tensors[run[0]], tensors[run[-1]]
            begin = first.start // PAGE * PAGE
            spans.append((begin, -(-(last.start + last.nbytes) // PAGE) * PAGE - begin))
        buffer = self._buffer(sum(size for _, size in spans))
        found: list[Tensor] = [buffer] * len(tensors)
        at = 0
        for run, (begin, size) in zip(runs, spans, strict=True):
            last = tensors[run[-1]]
            self._fill(last.file, begin, buffer[at : at + size], last.start + last.nbytes - begin)
            for i in run:
                place = at + tensors[i].start - begin
                found[i] = buffer[place : place + tensors[i].nbytes]
            at += size
        return found

    def _buffer(self, size: int) -> Tensor:
        buffer: Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < size:
            room = torch.empty(size + PAGE, dtype=torch.uint8)
            spare = -room.data_ptr() % PAGE
            buffer = self._own.buffer = room[spare : spare + size]
        return buffer

    def _fill(self, path: Path, start: int, part: Tensor, needed: int) -> None:
        """Read until `needed` bytes are there; the end of the file may come behind them."""
        view, done = part.numpy().data, 0
        try:
            file = self._file(path)
            missing = start + needed - os.fstat(file).st_size
            if missing > 0:
                raise CheckpointError(f"{path} ends {missing} bytes too early: fetch it again")
            while done < needed:
                got = os.preadv(file, [view[done:]], start + done)
                if not got:
                    raise CheckpointError(f"{path} became shorter while it was read: fetch it again")
                done += got
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the file and the disk") from error

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # of file systems without direct reads
                        raise
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[path]


def _close(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])
