"""The memory of a guest: kept as two files, and shared by all that start from it (sandbox.md 3).

A snapshot is a state (devices and processors, some tens of KiB) and the memory itself. QEMU writes the state alone
where a guest's memory is a shared file (`x-ignore-shared`); the memory is then copied without its holes into an
anonymous file that is sealed against writing. Children map that one privately: what they never change exists once.
A child's own changes are in no file, so that a snapshot of a child takes a detour: all of it is streamed into a
machine with shared memory, which is never started, and that one is saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from abyssal.sandbox.vm.disks import copy_sparse
from abyssal.sandbox.vm.machine import Machine
from abyssal.sandbox.vm.qemu import Hardware

_PAGE = 4096
_STEP = 4 << 20
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def anonymous(name: str, size: int = 0) -> int:
    """A file in memory that has no name, open for reading and writing; QEMU's user may use it too."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o666)
    os.ftruncate(fd, size)
    return fd


@dataclass(frozen=True)
class Saved:
    """A guest's memory; close it when no child is to start any more. Children that run keep what they need.

    Attributes:
        ram, state: sealed anonymous files.
    """

    ram: int
    state: int

    def close(self) -> None:
        os.close(self.ram)
        os.close(self.state)

    def keep(self, folder: Path) -> None:
        """Write it into a folder, as "ram" and "state"."""
        for name, fd in (("ram", self.ram), ("state", self.state)):
            with (folder / name).open("wb") as file:
                copy_sparse(fd, file.fileno())

    @property
    def digest(self) -> str:
        """Of both files."""
        digest = hashlib.sha256()
        for fd in (self.ram, self.state):
            at = 0
            while data := os.pread(fd, 1 << 22, at):
                digest.update(data)
                at += len(data)
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Saved:
        """What `keep` wrote."""
        fds = []
        for name in ("ram", "state"):
            fds.append(anonymous(name))
            with (folder / name).open("rb") as file:
                copy_sparse(file.fileno(), fds[-1])
            fcntl.fcntl(fds[-1], fcntl.F_ADD_SEALS, _SEALS)
        return cls(*fds)


async def save(machine: Machine, taken: Callable[[], Awaitable[None]]) -> Saved:
    """The memory of a machine that stands still.

    Args:
        machine: it.
        taken: called when it need not stand still any longer; what goes with the memory, such as disks, is copied here.
    Raises:
        QmpError: QEMU refused.
    """
    state = anonymous("state")
    await _send(machine, state)
    if machine.shared:
        ram = anonymous("ram")
        await asyncio.to_thread(copy_sparse, machine.memory, ram)
        await taken()
    else:
        await taken()
        ram, state = await _shared(machine, state)
    for fd in (ram, state):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return Saved(ram, state)


async def load(machine: Machine, state: int) -> None:
    """Give a machine that waits for it a saved state; it stands still afterwards."""
    await _ignore_shared(machine, True)
    await _hand_over(machine, state)
    await machine.monitor.run("migrate-incoming", uri="fd:state")
    await machine.monitor.migrated()


async def _shared(machine: Machine, stream: int) -> tuple[int, int]:
    """Memory and state apart, of a stream that has both; closes the stream."""
    ram = anonymous("ram", machine.hardware.memory)
    ferry = await Machine.start("ferry", machine.hardware, os.dup(ram), machine.scratch, shared=True, incoming=True)
    try:
        await _hand_over(ferry, stream)
        await ferry.monitor.run("migrate-incoming", uri="fd:state")
        await ferry.monitor.migrated()
        state = anonymous("state")
        await _send(ferry, state)
        return await asyncio.to_thread(_without_zeros, ram), state
    finally:
        os.close(stream)
        os.close(ram)
        await ferry.end()


def _without_zeros(source: int) -> int:
    """A copy in which pages of zeros are holes: a stream has filled them all."""
    target = anonymous("ram", os.fstat(source).st_size)
    at = 0
    while data := os.pread(source, _STEP, at):
        used = np.frombuffer(data, np.uint64).reshape(-1, _PAGE // 8).any(axis=1)
        edges = np.flatnonzero(np.diff(used, prepend=False, append=False)) * _PAGE
        for begin, end in edges.reshape(-1, 2).tolist():
            os.pwrite(target, data[begin:end], at + begin)
        at += len(data)
    return target


async def _send(machine: Machine, state: int) -> None:
    await _ignore_shared(machine, machine.shared)
    # it stands still: as fast as it goes
    await machine.monitor.run("migrate-set-parameters", max_bandwidth=1 << 40)
    await _hand_over(machine, state)
    await machine.monitor.run("migrate", uri="fd:state")
    await machine.monitor.migrated()


async def _hand_over(machine: Machine, fd: int) -> None:
    """QEMU gets a descriptor with a position of its own, at the beginning."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR if _writable(fd) else os.O_RDONLY)
    try:
        await machine.monitor.run("getfd", fds=(again,), fdname="state")
    finally:
        os.close(again)


def _writable(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    return True


async def _ignore_shared(machine: Machine, on: bool) -> None:
    capabilities = [{"capability": "x-ignore-shared", "state": on}]
    await machine.monitor.run("migrate-set-capabilities", capabilities=capabilities)


async def restored(
    box_id: str, hardware: Hardware, saved: Saved, scratch: Path, admit: Callable[[int], None]
) -> Machine:
    """A machine that goes on where a saved one stood, with a disk that was copied at the same time."""
    ram = os.dup(saved.ram)
    machine = await Machine.start(box_id, hardware, ram, scratch, shared=False, incoming=True, admit=admit)
    try:
        await load(machine, saved.state)
        await machine.go()
    except BaseException:
        await machine.end()
        raise
    return machine
