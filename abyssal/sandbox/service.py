"""What the SDK speaks to: an edge in this process, or one elsewhere over HTTP, with the same methods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from abyssal.sandbox.api import Duplex, ProcessEvent, Spec
from abyssal.sandbox.log.blobs import Kept
from abyssal.sandbox.operation import Asked

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """A sandbox to create.

    Attributes:
        spec: what it shall be.
        engine: insist on this one.
        snapshot: id of a snapshot to start from.
        secrets: names and values that the log must not hold.
    """

    spec: Spec
    engine: str | None = None
    snapshot: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    """An operation that was asked for: its name, its place in the log, and whether its result was there before."""

    op_id: str
    seq: int
    replayed: bool


@dataclass(frozen=True)
class Answer:
    """The result of an operation and its streams."""

    op_id: str
    seq: int
    replayed: bool
    res: JSON
    streams: Mapping[str, Kept]


class Service(Protocol):
    """Sandboxes of one edge. Every method may raise any `SandboxError`."""

    async def capabilities(self) -> JSON:
        """Engines, what their probes found, their features, room."""

    async def create(self, wanted: Wanted, asked: Asked) -> JSON:
        """Create a sandbox; asked twice under one name, the same one."""

    async def list(self, labels: Mapping[str, str]) -> Sequence[JSON]:
        """Sandboxes that have all these labels."""

    async def info(self, sandbox: str) -> JSON:
        """What is known of a sandbox."""

    async def destroy(self, sandbox: str, actor: str = "local") -> None:
        """End a sandbox; its log stays. A second time does nothing."""

    async def begin(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Begun:
        """Begin an operation, or find the one that was asked for before."""

    async def result(self, sandbox: str, begun: Begun) -> Answer:
        """Wait for an operation's end."""

    async def call(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Answer:
        """Both."""

    def events(self, sandbox: str, op_id: str, stdout: int = 0, stderr: int = 0) -> AsyncIterator[ProcessEvent]:
        """Output of a command from these offsets on, and its end."""

    async def type(self, sandbox: str, op_id: str, data: bytes, actor: str = "local") -> None:
        """Type into a terminal."""

    async def dial(self, sandbox: str, port: int, actor: str = "local") -> Duplex:
        """A connection to a port inside, on its loopback; the caller closes it."""

    async def operations(self, sandbox: str) -> Sequence[JSON]:
        """All operations: op_id, seq, req, state."""

    async def stored(self, sandbox: str, op_id: str, name: str) -> Kept:
        """What the log has of an operation: its "stdout", "stderr", "data" read, or the "input" that went into it."""

    async def resolve(self, sandbox: str, op_id: str, res: JSON, actor: str = "local") -> None:
        """Declare how an operation of unknown outcome ended."""

    def log(self, sandbox: str, from_seq: int = 0, *, follow: bool = False) -> AsyncIterator[JSON]:
        """Records of a sandbox."""

    async def group(
        self, label: str, value: str, action: str, actor: str = "local", only: str | None = None
    ) -> Sequence[str]:
        """Pause, resume or stop all sandboxes with a label, or those of them that `only` created; returns their ids."""

    async def close(self) -> None:
        """Let go of it; sandboxes live on."""
