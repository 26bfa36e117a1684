"""Write a log: records in one order, durable in groups (sandbox.md 6).

While one group is on its way to the disk, others gather for the next; so a record waits for two flushes at most, and
nobody waits for company: well below the 5 ms that the specification allows for a group.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from abyssal.sandbox.errors import LogError
from abyssal.sandbox.log.blobs import Blobs
from abyssal.sandbox.log.frames import Fault, Frame, frame, scan
from abyssal.sandbox.log.reader import BLOBS, FILE, read_log
from abyssal.sandbox.log.records import Kind, Record, canonical, parse, sha256

# apart from asyncio's own threads, which engines may keep busy
DISK = ThreadPoolExecutor(8, thread_name_prefix="sandbox-log")


class Log:
    """The log of one sandbox, open for writing by one process.

    Args:
        folder: holds it; made if missing.
        sandbox: the id, of every record.
    Attributes:
        cut: the torn tail that was found and cut, or None.
        records: that the log had when it was opened.
        incarnation: of records to come.
        blobs: streams and files.
    Raises:
        LogError: another process writes it, or it is damaged or was changed.
    """

    def __init__(self, folder: Path, sandbox: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.sandbox = folder, sandbox
        path = folder / FILE
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._lock(path)
            found = read_log(folder)
            found.check()
            if found.records and found.records[0].sandbox != sandbox:
                raise LogError(f"{path} is the log of {found.records[0].sandbox}, not of {sandbox}")
            self.cut: Fault | None = found.fault
            if self.cut is not None:
                os.ftruncate(self._fd, found.good)
            if found.records or self.cut is not None:
                os.fsync(self._fd)
            _sync_folder(folder)
        except BaseException:
            os.close(self._fd)
            raise
        self.records = found.records
        self.blobs = Blobs(folder / BLOBS)
        self.incarnation = found.records[-1].incarnation if found.records else 0
        self._head, self._next = found.head, len(found.records)
        self._durable = self._next
        self._good = found.good
        self._pending: list[bytes] = []
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._flusher: asyncio.Task[None] | None = None
        self._failure: LogError | None = None
        self._grown = asyncio.Event()
        if self.cut is not None:
            self.add("log.cut", res={"offset": self.cut.offset, "bytes": self.cut.size, "why": self.cut.why})

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LogError(f"{path} is being written by another process: one edge owns a sandbox") from None

    @property
    def head(self) -> str:
        """Hash of the last record."""
        return self._head

    @property
    def next_seq(self) -> int:
        """Of the record that comes next."""
        return self._next

    def add(
        self,
        kind: Kind,
        *,
        op_id: str | None = None,
        actor: str = "edge",
        rollout: Mapping[str, Any] | None = None,
        req: Any = None,
        res: Any = None,
        parent: Mapping[str, Any] | None = None,
    ) -> Record:
        """Fix a record's place; it is durable once `durable` returns.

        Raises:
            LogError: the disk refused an earlier record.
        """
        if self._failure is not None:
            raise self._failure
        record = Record(
            sandbox=self.sandbox, seq=self._next, incarnation=self.incarnation, kind=kind, op_id=op_id, actor=actor,
            t=datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            mono_ns=time.monotonic_ns(), rollout=rollout, req=req,
            req_sha256=None if req is None else sha256(canonical(req)), res=res, parent=parent, prev=self._head,
        ).sealed()  # fmt: skip
        self._head, self._next = record.hash, record.seq + 1
        self._pending.append(frame(record.payload()))
        return record

    async def durable(self, record: Record) -> None:
        """Wait until a record is on the disk.

        Raises:
            LogError: the disk refused it.
        """
        if record.seq < self._durable:
            return
        if self._failure is not None:
            raise self._failure
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append((record.seq, waiting))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await waiting

    async def append(self, kind: Kind, **fields: Any) -> Record:
        """Add a record and wait until it is durable."""
        record = self.add(kind, **fields)
        await self.durable(record)
        return record

    async def _flush(self) -> None:
        while self._pending:
            group, last = b"".join(self._pending), self._next
            self._pending.clear()
            try:
                await asyncio.get_running_loop().run_in_executor(DISK, self._write, group)
            except OSError as error:
                self._failure = LogError(
                    f"the log in {self.folder} cannot be written ({error.strerror}): free space or replace the disk"
                )
                self._wake(None)
                return
            self._good += len(group)
            self._durable = last
            self._wake(last)
            self._grown.set()
            self._grown = asyncio.Event()

    def _wake(self, durable: int | None) -> None:
        keep: deque[tuple[int, asyncio.Future[None]]] = deque()
        for seq, waiting in self._waiting:
            if waiting.done():  # its waiter was cancelled
                continue
            if durable is None:
                waiting.set_exception(self._failure or LogError("the log is closed"))
            elif seq < durable:
                waiting.set_result(None)
            else:
                keep.append((seq, waiting))
        self._waiting = keep

    def _write(self, group: bytes) -> None:
        try:
            view = memoryview(group)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._good)  # nobody was told of these
            raise

    async def read(self, start: int = 0, *, follow: bool = False) -> AsyncIterator[Record]:
        """Durable records from a place on; with `follow`, also those to come until the log is closed."""
        offset = 0
        while True:
            grown, good, closed = self._grown, self._good, self._fd < 0
            if offset < good:
                payloads = await asyncio.get_running_loop().run_in_executor(DISK, self._payloads, offset, good)
                offset = good
                for payload in payloads:
                    record = parse(payload)
                    if record.seq >= start:
                        yield record
            elif not follow or closed:
                return
            else:
                await grown.wait()

    def _payloads(self, start: int, end: int) -> list[bytes]:
        with open(self.folder / FILE, "rb") as file:
            file.seek(start)
            return [found.payload for found in scan(file.read(end - start)) if isinstance(found, Frame)]

    async def close(self) -> None:
        """Flush, and let others write."""
        if self._fd < 0:
            return
        if self._pending and self._failure is None and (self._flusher is None or self._flusher.done()):
            self._flusher = asyncio.create_task(self._flush())
        if self._flusher is not None:
            await self._flusher
        os.close(self._fd)
        self._fd = -1
        self._failure = self._failure or LogError(f"the log in {self.folder} is closed")
        self._grown.set()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
