"""How sandboxes come to be: created, warmed, restored, forked, taken over from an earlier edge."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from abyssal.sandbox import shapes
from abyssal.sandbox.admission import Admission
from abyssal.sandbox.api import Box, Engine, Network, Restores, Spec
from abyssal.sandbox.errors import ImageError, SandboxError, Unsupported
from abyssal.sandbox.held import Sheet
from abyssal.sandbox.keeping import Keeping
from abyssal.sandbox.lasting import Adopts, Lasting
from abyssal.sandbox.live import Live, keep_secrets
from abyssal.sandbox.log.writer import Log
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.placement import Placement
from abyssal.sandbox.pool import WarmPool, kind
from abyssal.sandbox.service import Wanted

# so that a rerun has a chance to come out equal (sandbox.md 6)
QUIET_ENV = {"TZ": "UTC", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


class Nursery:
    """Makes the sandboxes of an edge.

    Args:
        edge_id: first part of all ids.
        home: folder of the edge.
        key: of this host, for tags of secrets.
        placement, admission: of the edge.
        warm: sandboxes to have ready, and how many of each.
        permit: raises for network policies that the host does not permit.
    Attributes:
        boxes: folder with a sheet, a log and snapshots for each sandbox.
        folders: folder with the folder of an engine for each.
        live: sandboxes whose logs are open.
        keeping: holds them for the next edge; set by the edge.
        pool: of warm boxes.
    """

    def __init__(
        self,
        edge_id: str,
        home: Path,
        key: bytes,
        placement: Placement,
        admission: Admission,
        warm: Sequence[tuple[Spec, int]],
        permit: Callable[[Network], None],
    ):
        self._edge_id, self._key, self._permit = edge_id, key, permit
        self._placement, self._admission = placement, admission
        self.boxes, self.folders = home / "boxes", home / "live"
        self.boxes.mkdir(exist_ok=True)
        self.folders.mkdir(exist_ok=True)
        self.live: dict[str, Live] = {}
        self.keeping = Keeping(home, None)
        self.pool = WarmPool([(quiet(spec), count) for spec, count in warm], self._make_warm, self._drop_warm)
        self._starting: set[str] = set()

    async def again(self, sheet: Sheet, folder: Path, handles: Mapping[str, int]) -> Live:
        """Take over a sandbox of an earlier edge, or open the log of one that lives no more.

        Args:
            sheet, folder: what is kept of it.
            handles: what leads to it, where that was held.
        """
        log = await asyncio.to_thread(Log, folder / "log", sheet.id)
        box: Box | None = None
        why = sheet.why
        engine, lasting = self._placement.known(sheet.engine), False
        if sheet.alive:
            try:
                if not isinstance(engine, Adopts):
                    raise Unsupported(f"sandboxes of engine {engine.name} end with their edge, or it is not offered")
                place = self.folders / sheet.id
                box = await engine.adopt(sheet.id, sheet.spec, place, handles, paused=sheet.status == "paused")
                lasting = self._hold(engine, box)
                await log.append("adopt")
            except (SandboxError, OSError) as error:
                why = str(error)
        for handle in handles.values():
            os.close(handle)
        if box is None and sheet.status != "lost":
            await log.append("agent.lost", res={"type": "AgentLost", "cause": "unknown", "message": why})
        live = Live(sheet, folder, engine, box, log, self._key, self._fork, self._permit, lasting=lasting)
        if box is None:
            self.keeping.forget(sheet.id)
            live.newly_lost = sheet.status != "lost"
            await live.change(status="lost", why=why)
        return live

    def _hold(self, engine: Engine, box: Box) -> bool:
        """Have it outlive this edge, where it can; returns whether it does."""
        if not self.keeping.active or not isinstance(engine, Adopts) or engine.state is None:
            return False
        if isinstance(box, Lasting):
            self.keeping.hold(box.id, engine.name, engine.state, box.handles())
            return True
        return False

    async def create(self, wanted: Wanted, asked: Asked, digest: str) -> Live:
        """Create a sandbox; nothing of it stays if that fails.

        Args:
            wanted: what.
            asked: by whom.
            digest: of what was asked for, kept to know it again.
        """
        spec = wanted.spec
        source = None if wanted.snapshot is None else self._snapshot(wanted.snapshot)
        engine = await self._placement.choose(spec, source.sheet.engine if source is not None else wanted.engine)
        await self._admission.enter(spec)
        try:
            warm = None if source is not None else self.pool.take(spec)
            box_id = self._new_id() if warm is None else warm[0]
            now = time.time()
            parent = None if source is None else {"snapshot": wanted.snapshot, **_tip(source)}
            sheet = Sheet(
                box_id, spec, engine.name, "creating", now, now + spec.ttl, op_id=asked.op_id, actor=asked.actor,
                parent=parent, digest=digest,
            )  # fmt: skip
            folder = self.boxes / box_id
            self._starting.add(box_id)  # or a sweep would take it for a leftover
            log: Log | None = None
            try:
                log = await self._begin(folder, sheet, wanted.secrets, asked)
                box = warm[1] if warm is not None else await self._start(engine, sheet, wanted.snapshot)
                return await self._finish(sheet, folder, engine, box, log)
            except BaseException:
                self._starting.discard(box_id)
                if log is not None:
                    await log.close()
                await self._abandon(engine, sheet, folder)
                raise
            finally:
                self._starting.discard(box_id)
        except BaseException:
            self._admission.leave(spec)
            raise
        finally:
            self._admission.started()

    async def _begin(self, folder: Path, sheet: Sheet, hidden: Mapping[str, str], asked: Asked) -> Log:
        folder.mkdir(exist_ok=True)
        (self.folders / sheet.id).mkdir(exist_ok=True)
        await asyncio.to_thread(keep_secrets, folder, hidden)
        log = await asyncio.to_thread(Log, folder / "log", sheet.id)
        log.add(  # on the disk with "ready": what is cut off before is a leftover, and has no sheet
            "create", actor=asked.actor, rollout=asked.rollout, parent=sheet.parent,
            req={"spec": shapes.plain(sheet.spec), "engine": sheet.engine},
        )  # fmt: skip
        return log

    async def _start(self, engine: Engine, sheet: Sheet, snapshot: str | None) -> Box:
        if snapshot is None:
            return await engine.create(sheet.id, sheet.spec, self.folders / sheet.id)
        if not isinstance(engine, Restores):
            raise Unsupported(f"engine {engine.name} cannot start from snapshots")
        source, name = snapshot.split("/")
        kept = self.boxes / source / "snapshots" / name
        return await engine.restore(sheet.id, sheet.spec, self.folders / sheet.id, kept)

    async def _finish(self, sheet: Sheet, folder: Path, engine: Engine, box: Box, log: Log) -> Live:
        placed = shapes.plain(box.placed)
        log.incarnation += 1
        if sheet.parent is not None and "snapshot" in sheet.parent:
            log.add("restore", res={"snapshot": sheet.parent["snapshot"]})
        await log.append("ready", res=placed)
        lasting = self._hold(engine, box)
        live = Live(sheet, folder, engine, box, log, self._key, self._fork, self._permit, lasting=lasting)
        await live.change(status="running", placed=box.placed)
        self.live[sheet.id] = live
        return live

    async def _abandon(self, engine: Engine, sheet: Sheet, folder: Path) -> None:
        """Nothing stays of a creation that failed."""
        with suppress(SandboxError):
            await engine.sweep(frozenset(self.live) | self.pool.ids | self._starting)
        await self.remove(folder, self.folders / sheet.id)

    async def remove(self, *folders: Path) -> None:
        """Remove folders and all in them."""
        for folder in folders:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _new_id(self) -> str:
        return f"{self._edge_id}-{secrets.token_hex(16)}"

    async def _make_warm(self, spec: Spec) -> tuple[str, Box]:
        engine = await self._placement.choose(spec)
        box_id = self._new_id()
        folder = self.folders / box_id
        folder.mkdir()
        self._starting.add(box_id)
        try:
            return box_id, await engine.create(box_id, kind(spec), folder)
        finally:
            self._starting.discard(box_id)

    async def _drop_warm(self, box_id: str, box: Box) -> None:
        await box.stop()
        await self.remove(self.folders / box_id)

    def _snapshot(self, snapshot: str) -> Live:
        source = self.live.get(snapshot.split("/")[0])
        if source is None or snapshot not in source.sheet.snapshots:
            raise ImageError(f"no snapshot {snapshot} on this edge: its sandbox has to be there still")
        return source

    async def _fork(self, parent: Live, count: int) -> Sequence[str]:
        if "fork" not in parent.box.features:
            raise Unsupported(f"engine {parent.engine.name} cannot fork")
        ids: list[str] = []
        spec, tip = parent.sheet.spec, _tip(parent)
        try:
            for _ in range(count):
                await self._admission.enter(spec)
                ids.append(self._new_id())
                self._admission.started()
            self._starting |= set(ids)
            folders = {box_id: self.boxes / box_id for box_id in ids}
            logs: dict[str, Log] = {}
            now = time.time()
            sheets = {
                box_id: Sheet(box_id, spec, parent.engine.name, "creating", now, now + spec.ttl,
                              actor=parent.sheet.actor, parent=tip)
                for box_id in ids
            }  # fmt: skip
            for box_id in ids:
                log = await self._begin(folders[box_id], sheets[box_id], {}, Asked())
                log.incarnation = parent.recorded.log.incarnation
                logs[box_id] = log
            boxes = await parent.box.fork(ids)
        except BaseException:
            self._starting -= set(ids)
            for box_id in ids:
                self._admission.leave(spec)
                await self.remove(self.boxes / box_id, self.folders / box_id)
            raise
        for box_id, box in zip(ids, boxes, strict=True):
            await self._finish(sheets[box_id], folders[box_id], parent.engine, box, logs[box_id])
        self._starting -= set(ids)
        return ids


def quiet(spec: Spec) -> Spec:
    """A request whose programs find the same time, language and seed everywhere, unless it says otherwise."""
    return replace(spec, env={**QUIET_ENV, **spec.env})


def _tip(live: Live) -> dict[str, Any]:
    log = live.recorded.log
    return {"sandbox": live.sheet.id, "seq": log.next_seq - 1, "hash": log.head}
