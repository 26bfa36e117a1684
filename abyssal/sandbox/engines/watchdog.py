"""Limits that the kernel does not enforce: looked at now and then, and the sandbox killed where one is passed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from abyssal.sandbox.api import Limits
from abyssal.sandbox.errors import Cause

EVERY_S = 0.25


async def watch(pid: int, upper: Path, limits: Limits, tell: Callable[[Cause], None], *, memory: bool) -> None:
    """Look until cancelled.

    Args:
        pid: the sandbox's first process as numbered here; killing it kills all.
        upper: what the sandbox has written.
        limits: of disk, and of memory if `memory`.
        tell: told why, before the sandbox is killed.
    """
    while True:
        await asyncio.sleep(EVERY_S)
        cause: Cause | None = None
        if await asyncio.to_thread(disk_used, upper) > limits.disk:
            cause = "killed"
        elif memory and await asyncio.to_thread(memory_used, pid) > limits.memory:
            cause = "oom"
        if cause is not None:
            tell(cause)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return


def disk_used(folder: Path) -> int:
    """Bytes on disk below a folder; holes are not counted."""
    used, pending = 0, [folder]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with suppress(OSError):
                    used += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
    return used


def memory_used(pid: int) -> int:
    """Resident bytes of a process and all below it; shared pages count for each."""
    used, pending = 0, [pid]
    page = os.sysconf("SC_PAGE_SIZE")
    while pending:
        one = pending.pop()
        with suppress(OSError, ValueError):
            used += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * page
            for path in Path(f"/proc/{one}/task").glob("*/children"):
                pending += map(int, path.read_text().split())
    return used
