"""One operation while it runs and after: its output as it comes, its result once that is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from abyssal.sandbox.api import Process, ProcessEvent, Stderr, Stdout
from abyssal.sandbox.log.blobs import Blobs, Kept
from abyssal.sandbox.log.output import Budget, Output
from abyssal.sandbox.shapes import error_of, exit_of

# bytes a second that a command may write once its output is only counted
THROTTLE = 16 << 20


@dataclass(frozen=True)
class Asked:
    """Who asks for an operation, and where it stands among his others.

    Attributes:
        op_id: the caller's name for it; asking twice with one name gives one operation.
        stream, ordinal: the same for callers that count: the n-th operation of a stream.
        actor: id of the caller's token.
        rollout: job, episode, turn, tool_call_id.
    """

    op_id: str | None = None
    stream: str | None = None
    ordinal: int | None = None
    actor: str = "local"
    rollout: Mapping[str, Any] | None = None

    @property
    def place(self) -> tuple[str, int] | None:
        """Stream and ordinal, where both were given."""
        return None if self.stream is None or self.ordinal is None else (self.stream, self.ordinal)


class Operation:
    """An operation of a sandbox.

    Attributes:
        op_id, req, req_sha256: what it is.
        seq: of its first record.
        res: its result, once durable.
        process: while a command runs.
        cancelled: whether the caller ended it.
    """

    def __init__(self, op_id: str, req: Mapping[str, Any], req_sha256: str, blobs: Blobs):
        self.op_id, self.req, self.req_sha256 = op_id, req, req_sha256
        self.seq = -1
        self.res: Mapping[str, Any] | None = None
        self.process: Process | None = None
        self.started = asyncio.Event()
        self.cancelled = False
        self._blobs = blobs
        self._outputs: dict[str, Output] | None = None
        self._grown = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def running(self) -> bool:
        """Whether its result is still to come."""
        return self.res is None and self._failure is None

    def listen(self, cap: int, budget: Budget) -> dict[str, Output]:
        """Begin to keep output."""
        self._outputs = {"stdout": Output(cap, budget), "stderr": Output(cap, budget)}
        return self._outputs

    def partial(self) -> Mapping[str, Kept]:
        """What was written so far."""
        return {name: output.kept() for name, output in (self._outputs or {}).items()}

    def grew(self) -> None:
        """Wake who waits for output or the result."""
        self._grown.set()
        self._grown = asyncio.Event()

    def finish(self, res: Mapping[str, Any]) -> None:
        """The result is durable."""
        self.res = res
        self._outputs = None
        self.process = None
        self.started.set()
        self.grew()

    def fail(self, error: Exception) -> None:
        """The platform, not the operation, failed."""
        self._failure = error
        self.process = None
        self.started.set()
        self.grew()

    async def result(self) -> Mapping[str, Any]:
        """Wait for it.

        Raises:
            SandboxError: the operation failed; the same error each time it is asked for.
        """
        while self.running:
            await self._grown.wait()
        if self._failure is not None:
            raise self._failure
        assert self.res is not None
        if "error" in self.res:
            raise error_of(self.res["error"])
        return self.res

    def kept(self, name: str) -> Kept:
        """A stream of a finished operation."""
        assert self.res is not None
        return self._blobs.fetch(self.res[name])

    async def events(self, stdout: int = 0, stderr: int = 0) -> AsyncIterator[ProcessEvent]:
        """Output from these offsets on, then how it ended; the end comes only once it is durable.

        Raises:
            SandboxError: the operation failed.
        """
        at = {"stdout": stdout, "stderr": stderr}
        kinds: dict[str, type[Stdout | Stderr]] = {"stdout": Stdout, "stderr": Stderr}
        while self.running:
            grown = self._grown
            for name, output in (self._outputs or {}).items():
                offset, data = output.read(at[name])
                if data:
                    yield kinds[name](data, offset)
                    at[name] = offset + len(data)
            if self.running:
                await grown.wait()
        res = await self.result()
        for name, kind in kinds.items():
            if name in res:
                for offset, data in _pieces(self.kept(name)):
                    skip = max(at[name] - offset, 0)
                    if skip < len(data):
                        yield kind(data[skip:], offset + skip)
        if "exit_code" in res:
            yield exit_of(res)


def _pieces(kept: Kept) -> list[tuple[int, bytes]]:
    """Beginning and end with their offsets."""
    if not kept.truncated:
        return [(0, kept.data)]
    return [(0, kept.data[: kept.head]), (kept.total - (len(kept.data) - kept.head), kept.data[kept.head :])]
