"""A sandbox's first process, as numbered here: it ends, and all in the sandbox ends with it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from abyssal.sandbox.errors import AgentLost

STEP_S = 0.01


@dataclass(frozen=True)
class First:
    """The process; a number alone would be somebody else's once it is gone.

    Attributes:
        pid: its number.
        began: when, in the kernel's ticks.
    """

    pid: int
    began: int

    @classmethod
    def below(cls, parent: int) -> First:
        """The only child of a program that made it and waits for it.

        Raises:
            AgentLost: there is none.
        """
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                for word in path.read_text().split():
                    if (began := _began(int(word))) is not None:
                        return cls(int(word), began)
        raise AgentLost("unknown", "the sandbox ended while it was being started")

    @property
    def lives(self) -> bool:
        """Whether it is there still."""
        return _began(self.pid) == self.began

    async def gone(self, patience: float) -> None:
        """Wait for its end, so many seconds at most."""
        until = asyncio.get_running_loop().time() + patience
        while self.lives and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(STEP_S)

    def kill(self) -> None:
        """End it, if it lives."""
        if self.lives:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _began(pid: int) -> int | None:
    """None where there is no such process, or one that has ended and was not waited for."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if said[0] in "ZX" else int(said[19])
