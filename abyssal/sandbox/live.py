"""One sandbox of an edge: its sheet, its log, its box, and the operations that concern the edge."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from abyssal.base.files import write_bytes
from abyssal.sandbox import shapes
from abyssal.sandbox.api import Box, Duplex, Engine, Network, Networked
from abyssal.sandbox.errors import BadRequest, LogError, Unsupported
from abyssal.sandbox.held import Sheet
from abyssal.sandbox.log.hiding import Hiding
from abyssal.sandbox.log.writer import Log
from abyssal.sandbox.network.ports import Dialled
from abyssal.sandbox.operation import Operation
from abyssal.sandbox.recorded import Recorded

SECRETS = "secrets.json"
ENDING_S = 3.0
Fork = Callable[["Live", int], Awaitable[Sequence[str]]]


class Live:
    """A sandbox whose log is open.

    Args:
        sheet, folder: what is kept of it.
        engine: that runs it.
        box: None for one that is lost.
        log: open.
        key: of this host, for tags of secrets.
        fork: the edge's part in forks.
        permit: raises for network policies that the host does not permit.
        lasting: whether the box outlives this edge.
    Attributes:
        newly_lost: whether it lived when the last edge saw it.
    """

    def __init__(
        self,
        sheet: Sheet,
        folder: Path,
        engine: Engine,
        box: Box | None,
        log: Log,
        key: bytes,
        fork: Fork,
        permit: Callable[[Network], None],
        *,
        lasting: bool = False,
    ):
        self.sheet, self.folder, self.engine = sheet, folder, engine
        self.newly_lost = False
        self._fork, self._permit = fork, permit
        extra = {
            "pause": self._pause, "resume": self._resume, "snapshot": self._snapshot, "fork": self._forked,
            "network": self._network, "ttl": self._ttl,
        }  # fmt: skip
        self._dialled = 0
        self.recorded = Recorded(box, log, sheet.spec.limits, Hiding(key, secrets(folder)), extra, lasting=lasting)
        if isinstance(box, Networked):
            box.tell_denied(lambda denied: self._note("net.denied", shapes.plain(denied)))

    @property
    def box(self) -> Box:
        """The box of one that is not lost."""
        if self.recorded.box is None or self.recorded.lost is not None:
            raise self.recorded.lost or BadRequest("the sandbox has no box")
        return self.recorded.box

    def _note(self, kind: Any, res: Mapping[str, Any]) -> None:
        with suppress(LogError):  # a connection of a sandbox that is being closed
            self.recorded.log.add(kind, res=res)

    async def dial(self, port: int, actor: str) -> Duplex:
        """A connection to a port inside; while it is open, the sandbox is not idle.

        Raises:
            Unsupported: the engine has no ports.
            NotFound, Timeout, AgentLost: nobody answers there.
        """
        box = self.box
        if not isinstance(box, Networked):
            raise Unsupported(f"engine {self.engine.name} has no ports: choose substrate container, microvm or vm")
        self.recorded.log.add("port", actor=actor, res={"port": port})
        found = await box.dial(port)
        self._dialled += 1
        return Dialled(found, self._left)

    def _left(self) -> None:
        self._dialled -= 1
        self.recorded.active = time.monotonic()

    async def change(self, **fields: Any) -> None:
        """Change its sheet, on the disk first."""
        sheet = self.sheet.changed(**fields)
        await asyncio.to_thread(sheet.write, self.folder)
        self.sheet = sheet

    def due(self, now: float, mono: float) -> str | None:
        """Why it is to end now, or None."""
        if now >= self.sheet.deadline:
            return "ttl"
        idle = self.sheet.spec.idle_ttl
        if idle is not None and self.sheet.status == "running" and not self.recorded.running and not self._dialled:
            return "idle_ttl" if mono - self.recorded.active >= idle else None
        return None

    async def end(self, kind: Any, actor: str, res: Mapping[str, Any] | None = None) -> str:
        """Stop the box, let its operations learn of it, close the log; returns the log's head."""
        recorded = self.recorded
        if recorded.box is not None:
            await recorded.box.stop()
        until = time.monotonic() + ENDING_S
        while recorded.running and time.monotonic() < until:
            await asyncio.sleep(0.01)
        await recorded.log.append(kind, actor=actor, res=res)
        await recorded.close()
        return recorded.log.head

    async def _pause(self, operation: Operation) -> Mapping[str, Any]:
        await self.box.pause()
        self.recorded.log.add("pause", op_id=operation.op_id)
        await self.change(status="paused")
        return {"state": "done"}

    async def _resume(self, operation: Operation) -> Mapping[str, Any]:
        await self.box.resume()
        self.recorded.log.add("resume", op_id=operation.op_id)
        await self.change(status="running")
        return {"state": "done"}

    async def _snapshot(self, operation: Operation) -> Mapping[str, Any]:
        name = operation.op_id
        digests = dict(
            await self.box.snapshot(self.folder / "snapshots" / name, memory=bool(operation.req.get("memory")))
        )
        snapshot = f"{self.sheet.id}/{name}"
        self.recorded.log.add("snapshot", op_id=name, res={"snapshot": snapshot, "digests": digests})
        await self.change(snapshots={**self.sheet.snapshots, snapshot: operation.seq})
        return {"state": "done", "snapshot": snapshot, "digests": digests}

    async def _forked(self, operation: Operation) -> Mapping[str, Any]:
        count = operation.req.get("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 256:
            raise BadRequest(f"{count!r} is no number of forks between 1 and 256")
        children = list(await self._fork(self, count))
        self.recorded.log.add("fork", op_id=operation.op_id, res={"children": children})
        return {"state": "done", "children": children}

    async def _network(self, operation: Operation) -> Mapping[str, Any]:
        network = shapes.network(operation.req["network"])
        self._permit(network)
        await self.box.set_network(network)
        self.recorded.log.add("net.policy", op_id=operation.op_id, res=shapes.plain(network))
        await self.change(spec=replace(self.sheet.spec, network=network))
        return {"state": "done"}

    async def _ttl(self, operation: Operation) -> Mapping[str, Any]:
        seconds = shapes.seconds(operation.req["ttl"], "ttl")
        await self.change(deadline=time.time() + seconds)
        self.recorded.log.add("ttl", op_id=operation.op_id, res={"ttl": seconds})
        return {"state": "done"}


def secrets(folder: Path) -> dict[str, str]:
    """Secrets of a sandbox, as its edge keeps them."""
    try:
        return json.loads((folder / SECRETS).read_bytes())
    except FileNotFoundError:
        return {}


def keep_secrets(folder: Path, values: Mapping[str, str]) -> None:
    """Keep them where only the edge reads."""
    if values:
        write_bytes(folder / SECRETS, json.dumps(dict(values)).encode())
        (folder / SECRETS).chmod(0o600)
