"""The edge: all sandboxes of this host, their logs and their time to live, whoever asks for them (sandbox.md 9).

A home folder belongs to one edge process at a time. When an edge starts, it takes over what its predecessor left:
sandboxes that still live are adopted, those that do not are lost and answer from their logs, and leftovers of both
are swept.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from abyssal.sandbox import held, shapes
from abyssal.sandbox.admission import Admission, Capacity
from abyssal.sandbox.api import Duplex, Engine, Network, ProcessEvent, Spec
from abyssal.sandbox.errors import (
    BadRequest,
    Divergence,
    Expired,
    NotFound,
    PolicyDenied,
)
from abyssal.sandbox.held import Sheet
from abyssal.sandbox.home import Home
from abyssal.sandbox.keeping import Keeping
from abyssal.sandbox.lasting import Adopts, Lasting
from abyssal.sandbox.live import Live
from abyssal.sandbox.log.blobs import Kept
from abyssal.sandbox.log.reader import operations, read_log
from abyssal.sandbox.log.records import canonical, sha256
from abyssal.sandbox.nursery import Nursery, quiet
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.placement import Placement
from abyssal.sandbox.service import JSON, Answer, Begun, Wanted

logger = logging.getLogger("abyssal.sandbox")
TICK_S = 0.25


class Edge:
    """Sandboxes of this host; see `Service`. Made by `Edge.open`.

    Attributes:
        id: of this edge, the first part of its sandboxes' ids.
        placement, admission, pool: see there.
        adopted, lost, swept: what the start found.
    """

    def __init__(
        self,
        home: Path,
        engines: Sequence[Engine],
        capacity: Capacity,
        warm: Sequence[tuple[Spec, int]],
        open_network: bool,
        name: str | None = None,
    ):
        self._home, self._open_network = Home(home, name), open_network
        self.id = self._home.id
        self.placement = Placement(engines, home / "probes.json")
        self.admission = Admission(capacity)
        self._nursery = Nursery(self.id, home, self._home.key, self.placement, self.admission, warm, self._permit)
        self.pool, self._live = self._nursery.pool, self._nursery.live
        self._boxes, self._folders = self._nursery.boxes, self._nursery.folders
        self._gone: dict[str, Sheet] = {}
        self._created: dict[str, tuple[str, asyncio.Task[Live]]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None
        self.adopted: list[str] = []
        self.lost: list[str] = []
        self.swept: list[str] = []

    @classmethod
    async def open(
        cls,
        home: Path,
        engines: Sequence[Engine],
        *,
        capacity: Capacity | None = None,
        warm: Sequence[tuple[Spec, int]] = (),
        open_network: bool = False,
        name: str | None = None,
        grace: float | None = None,
    ) -> Self:
        """Start, take over what lives, sweep what does not.

        Args:
            home: folder of the edge; made if missing.
            engines: in order of preference.
            capacity: of the host.
            warm: sandboxes to have ready, and how many of each.
            open_network: whether sandboxes may ask for the network mode "open".
            name: id for the edge of a new folder; None for a random one.
            grace: seconds for which sandboxes outlive an edge that was killed, for the next one to take them over; None
                has them end with it.
        Raises:
            Rejected: another edge runs on this folder.
        """
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        edge = cls(home, engines, capacity or Capacity(), warm, open_network, name)
        for engine in engines:
            if isinstance(engine, Adopts):
                engine.lasting = grace is not None
        await edge._take_over(grace)
        edge._keeper = asyncio.create_task(edge._keep())
        edge.pool.fill()
        return edge

    # start and end

    async def _take_over(self, grace: float | None) -> None:
        keeping, handles = await Keeping.take(self._home.folder, grace)
        self._nursery.keeping = keeping
        for folder in sorted(self._boxes.iterdir()):
            if not (folder / held.FILE).exists():  # a warm box, or a creation that was cut
                continue
            sheet = held.read(folder)
            if sheet.status in ("gone", "expired"):
                self._gone[sheet.id] = sheet
            elif sheet.status != "creating":  # nobody was told of such a one, so it is a leftover
                self._enter(await self._nursery.again(sheet, folder, handles.pop(sheet.id, {})))
        for name, left in handles.items():  # its end was not told to the keeper
            for handle in left.values():
                os.close(handle)
            keeping.forget(name)
        alive = frozenset(name for name, live in self._live.items() if live.sheet.alive)
        for engine in self.placement.engines:
            self.swept += await engine.sweep(alive)
        for folder in self._boxes.iterdir():
            if folder.name not in self._live and folder.name not in self._gone:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                self.swept.append(folder.name)
        for folder in self._folders.iterdir():
            if folder.name not in alive:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                self.swept.append(folder.name)

    def _enter(self, live: Live) -> None:
        self._live[live.sheet.id] = live
        if live.recorded.box is not None:
            self.adopted.append(live.sheet.id)
        elif live.newly_lost:
            self.lost.append(live.sheet.id)
        self.admission.take(live.sheet.spec)
        if live.sheet.op_id is not None:
            task: asyncio.Task[Live] = asyncio.create_task(_ready(live))
            self._created[live.sheet.op_id] = (live.sheet.digest, task)

    async def _keep(self) -> None:
        """End what is due."""
        while True:
            await asyncio.sleep(TICK_S)
            self._nursery.keeping.mend()
            now, mono = time.time(), time.monotonic()
            for live in list(self._live.values()):
                why = live.due(now, mono)
                if why is not None and live.sheet.id not in self._ending:
                    task = self._end(live, "expire", "edge", {"why": why})
                    task.add_done_callback(_logged)

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self.pool.close()
        await asyncio.gather(*self._ending.values(), return_exceptions=True)
        for live in self._live.values():
            box = live.recorded.box
            if box is not None and (isinstance(box, Lasting) or not isinstance(live.engine, Adopts)):
                await box.stop()  # nobody could take it over
            await live.recorded.close()
        await self._nursery.keeping.close()
        self._home.close()

    # creation

    async def create(self, wanted: Wanted, asked: Asked) -> JSON:
        wanted = replace(wanted, spec=quiet(shapes.spec(shapes.plain(wanted.spec))))
        self._permit(wanted.spec.network)
        digest = sha256(canonical({"spec": shapes.plain(wanted.spec), "snapshot": wanted.snapshot}))
        known = self._created.get(asked.op_id) if asked.op_id is not None else None
        if known is not None:
            if known[0] != digest:
                raise Divergence(
                    0, known[0], digest, f"{asked.op_id} created another sandbox before: take another name"
                )
            return (await asyncio.shield(known[1])).sheet.info()
        task = asyncio.create_task(self._nursery.create(wanted, asked, digest))
        if asked.op_id is not None:
            self._created[asked.op_id] = (digest, task)
            task.add_done_callback(lambda done: self._forget(asked.op_id or "", done))
        return (await asyncio.shield(task)).sheet.info()

    def knows(self, op_id: str) -> bool:
        """Whether a sandbox lives, or is about to, whose creation has this name."""
        return op_id in self._created

    def _permit(self, network: Network) -> None:
        if network.mode == "open" and not self._open_network:
            raise PolicyDenied("network mode open is not permitted on this host: its operator has to say so")

    def _forget(self, op_id: str, done: asyncio.Task[Live]) -> None:
        if done.cancelled() or done.exception() is not None:  # a refused creation may be tried again
            self._created.pop(op_id, None)

    # the end of a sandbox

    async def destroy(self, sandbox: str, actor: str = "local") -> None:
        if sandbox in self._gone:
            return
        await asyncio.shield(self._end(self._find(sandbox), "destroy", actor))

    def _end(self, live: Live, record: str, actor: str, res: JSON | None = None) -> asyncio.Task[None]:
        name = live.sheet.id
        if name not in self._ending:
            self._ending[name] = asyncio.create_task(self._finally(live, record, actor, res))
        return self._ending[name]

    async def _finally(self, live: Live, record: str, actor: str, res: JSON | None) -> None:
        head = await live.end(record, actor, res)
        self._nursery.keeping.drop(live.sheet.id)
        await asyncio.to_thread(self._home.keep_head, live.sheet.id, head)
        await live.change(status="expired" if record == "expire" else "gone", head=head)
        await self._nursery.remove(self._folders / live.sheet.id, live.folder / "snapshots")
        self._gone[live.sheet.id] = live.sheet
        del self._live[live.sheet.id]
        del self._ending[live.sheet.id]
        if live.sheet.op_id is not None:
            self._created.pop(live.sheet.op_id, None)
        self.admission.leave(live.sheet.spec)

    def _find(self, sandbox: str) -> Live:
        live = self._live.get(sandbox)
        ended = self._gone.get(sandbox) if live is None else live.sheet
        if live is not None and live.sheet.status not in ("gone", "expired"):
            return live
        if ended is not None:
            if ended.status == "expired":
                raise Expired(f"the time of sandbox {sandbox} has passed: its log is kept")
            raise NotFound(f"sandbox {sandbox} was stopped: its log is kept")
        raise NotFound(f"no sandbox {sandbox} on edge {self.id}")

    # what callers ask

    async def capabilities(self) -> JSON:
        engines = []
        for engine in self.placement.engines:
            found = await self.placement.probe(engine)
            engines.append(
                {
                    "name": engine.name, "substrates": list(engine.substrates), "features": sorted(engine.features),
                    "ok": found.ok, "detail": found.detail, "remedy": found.remedy,
                    "placed": None if found.placed is None else shapes.plain(found.placed),
                }
            )  # fmt: skip
        room = self.admission
        return {
            "edge": self.id,
            "engines": engines,
            "capacity": shapes.plain(room.capacity),
            "used": {"memory": room.memory, "sandboxes": room.sandboxes, "waiting": room.waiting},
        }

    async def list(self, labels: Mapping[str, str]) -> Sequence[JSON]:
        return [live.sheet.info() for live in self._live.values() if _has(live.sheet, labels)]

    async def info(self, sandbox: str) -> JSON:
        if sandbox in self._gone:
            return self._gone[sandbox].info()
        live = self._find(sandbox)
        return {**live.sheet.info(), "features": sorted(live.engine.features)}

    async def begin(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Begun:
        operation, replayed = await self._find(sandbox).recorded.ask(req, asked, data)
        return Begun(operation.op_id, operation.seq, replayed)

    async def result(self, sandbox: str, begun: Begun) -> Answer:
        operation = self._find(sandbox).recorded.find(begun.op_id)
        res = await operation.result()
        streams = {name: operation.kept(name) for name in ("stdout", "stderr", "data") if name in res}
        return Answer(operation.op_id, operation.seq, begun.replayed, res, streams)

    async def call(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Answer:
        return await self.result(sandbox, await self.begin(sandbox, req, asked, data))

    def events(self, sandbox: str, op_id: str, stdout: int = 0, stderr: int = 0) -> AsyncIterator[ProcessEvent]:
        return self._find(sandbox).recorded.find(op_id).events(stdout, stderr)

    async def type(self, sandbox: str, op_id: str, data: bytes, actor: str = "local") -> None:
        recorded = self._find(sandbox).recorded
        await recorded.tty_input(recorded.find(op_id), data, actor)

    async def dial(self, sandbox: str, port: int, actor: str = "local") -> Duplex:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            raise BadRequest(f"{port!r} is no port from 1 to 65535")
        return await self._find(sandbox).dial(port, actor)

    async def operations(self, sandbox: str) -> Sequence[JSON]:
        return [
            {
                "op_id": operation.op_id, "seq": operation.seq, "req": operation.req,
                "state": "running" if operation.res is None else operation.res["state"],
            }
            for operation in self._find(sandbox).recorded.operations
        ]  # fmt: skip

    async def stored(self, sandbox: str, op_id: str, name: str) -> Kept:
        found = await asyncio.to_thread(read_log, self.log_folder(sandbox))
        for entry in operations(found.records):
            if entry["op_id"] == op_id:
                holder = entry["req"].get("data") if name == "input" else entry["res"].get(name)
                if holder is None:
                    break
                return await asyncio.to_thread(found.blobs.fetch, holder)
        raise NotFound(f"sandbox {sandbox} has no operation {op_id} with {name}")

    def request(self, sandbox: str, op_id: str) -> JSON:
        """What an operation was asked to do.

        Raises:
            NotFound: there is none of that name.
        """
        return self._find(sandbox).recorded.find(op_id).req

    @property
    def token_key(self) -> bytes:
        """A key for tokens of sandboxes."""
        return hashlib.sha256(b"tokens" + self._home.key).digest()

    async def resolve(self, sandbox: str, op_id: str, res: JSON, actor: str = "local") -> None:
        await self._find(sandbox).recorded.resolve(op_id, res, actor)

    async def log(self, sandbox: str, from_seq: int = 0, *, follow: bool = False) -> AsyncIterator[JSON]:
        if sandbox in self._gone:
            found = await asyncio.to_thread(read_log, self.log_folder(sandbox))
            found.check(self._gone[sandbox].head)
            for record in found.records[from_seq:]:
                yield shapes.plain(record)
            return
        async for record in self._find(sandbox).recorded.log.read(from_seq, follow=follow):
            yield shapes.plain(record)

    def log_folder(self, sandbox: str) -> Path:
        """Where a sandbox's log lies.

        Raises:
            NotFound: there is no such sandbox.
        """
        if sandbox not in self._gone:
            self._find(sandbox)
        return self._boxes / sandbox / "log"

    async def group(
        self, label: str, value: str, action: str, actor: str = "local", only: str | None = None
    ) -> Sequence[str]:
        if action not in ("pause", "resume", "stop"):
            raise NotFound(f"groups know pause, resume and stop, not {action!r}")
        names = [
            name
            for name, live in self._live.items()
            if _has(live.sheet, {label: value}) and only in (None, live.sheet.actor)
        ]
        work = [
            self.destroy(name, actor) if action == "stop" else self.call(name, {"op": action}, Asked(actor=actor))
            for name in names
        ]
        for found in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
        return names


def _has(sheet: Sheet, labels: Mapping[str, str]) -> bool:
    return all(sheet.spec.labels.get(name) == value for name, value in labels.items())


async def _ready(live: Live) -> Live:
    return live


def _logged(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("a sandbox could not be ended", exc_info=task.exception())
