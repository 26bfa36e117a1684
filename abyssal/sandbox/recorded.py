"""A sandbox whose operations go through its log: none runs twice, no result is lost (sandbox.md 6).

Asking is one step without a pause in it: the log's index says whether the operation is known, and if not, it is
entered there and its place in the log is fixed. So two clients that race for the same place get one operation. The
intent is durable before the engine hears of it, the result before anybody else does. An operation belongs to its
sandbox, not to who asked: a caller that leaves, or is killed, changes nothing, and finds it again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from abyssal.base.errors import AbyssalError
from abyssal.sandbox.api import Box, Limits
from abyssal.sandbox.errors import (
    AgentLost,
    Divergence,
    LogError,
    NotFound,
    OutcomeUnknown,
    SandboxError,
    SandboxLost,
)
from abyssal.sandbox.lasting import Lasting, Left
from abyssal.sandbox.log.blobs import whole
from abyssal.sandbox.log.hiding import Hiding
from abyssal.sandbox.log.output import Budget
from abyssal.sandbox.log.records import Record, canonical, sha256
from abyssal.sandbox.log.spill import name_of
from abyssal.sandbox.log.writer import DISK, Log
from abyssal.sandbox.operation import Asked, Operation
from abyssal.sandbox.perform import READS, Performer
from abyssal.sandbox.shapes import error_json

logger = logging.getLogger("abyssal.sandbox")
Extra = Callable[[Operation], Awaitable[Mapping[str, Any]]]
Work = Callable[[], Awaitable[Mapping[str, Any]]]


class Recorded:
    """A box and its log.

    Args:
        box: the sandbox; None for one that is lost and lives in its log alone.
        log: open; what it holds already is what came before.
        limits: how much output is kept.
        hiding: of its secrets.
        extra: operations that are the caller's business, such as fork, by name.
        lasting: whether the box outlives this edge, and commands in it.
    Attributes:
        lost: why nobody answers in the sandbox any more, or None.
        active: when an operation last began or ended, on the monotonic clock.
    """

    def __init__(
        self,
        box: Box | None,
        log: Log,
        limits: Limits,
        hiding: Hiding,
        extra: Mapping[str, Extra] | None = None,
        *,
        lasting: bool = False,
    ):
        self.box, self.log, self._hiding, self._extra = box, log, hiding, dict(extra or {})
        self.budget = Budget(limits.outputs)
        self._performer = None if box is None else Performer(box, log, limits, hiding, self.budget, lasting=lasting)
        self._operations: dict[str, Operation] = {}
        self._places: dict[tuple[str, int], Operation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost: SandboxError | None = None if box is not None else _lost(log.sandbox)
        self.active = time.monotonic()
        self._restore()

    def _restore(self) -> None:
        open_ones: dict[str, Operation] = {}
        for record in self.log.records:
            if record.op_id is None:
                continue
            if record.kind == "op.intent" or record.kind in READS:
                operation = Operation(record.op_id, record.req, record.req_sha256 or "", self.log.blobs)
                operation.seq = record.seq
                self._enter(operation, _place(record))
                open_ones[record.op_id] = operation
            if record.kind in ("op.result", "op.resolved") or record.kind in READS:
                res = {name: value for name, value in record.res.items() if name != "place"}
                self._operations[record.op_id].finish(res)
                self._count(record.res)
                open_ones.pop(record.op_id, None)
        taken_over = self.box if self.log.records and isinstance(self.box, Lasting) else None
        running: dict[str, Operation] = {}
        for operation in open_ones.values():
            if taken_over is not None and operation.req["op"] == "exec":
                running[name_of(operation.op_id)] = operation
            else:
                self._give_up(operation)
        if taken_over is not None:
            self._begin(self._take_up(taken_over, running))

    def _give_up(self, operation: Operation) -> None:
        res = _unknown(operation.op_id)
        self.log.add("op.result", op_id=operation.op_id, res=res)
        operation.finish(res)

    async def _take_up(self, box: Lasting, running: Mapping[str, Operation]) -> None:
        """Attach to commands that an earlier edge began; of those that are not there, nobody knows the outcome."""
        found: dict[str, Left] = {}
        with suppress(AgentLost, ValueError, KeyError):  # a guest may say anything
            found = dict(await box.left())
        for name, operation in running.items():
            left = found.pop(name, None)
            if left is None or self._performer is None:
                self._give_up(operation)
                continue
            if operation.req.get("data") is not None and not left.fed:  # what it was to read died with the edge
                self._give_up(operation)
                await left.settle()
                continue
            intent = self.log.records[operation.seq]
            work = partial(self._performer.go_on, operation, left)
            self._begin(
                self._carry(operation, intent, Asked(actor=intent.actor), partial(self._safely, operation, work))
            )
        for left in found.values():
            await left.settle()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _enter(self, operation: Operation, place: tuple[str, int] | None) -> None:
        self._operations[operation.op_id] = operation
        if place is not None:
            self._places[place] = operation

    def _count(self, res: Mapping[str, Any]) -> None:
        for name in ("stdout", "stderr"):
            if name in res:
                self.budget.take(res[name]["bytes"])

    @property
    def running(self) -> list[Operation]:
        """Operations without a result."""
        return [operation for operation in self._operations.values() if operation.running]

    @property
    def operations(self) -> list[Operation]:
        """All, in their order."""
        return sorted(self._operations.values(), key=lambda operation: operation.seq)

    def find(self, op_id: str) -> Operation:
        """An operation by its name.

        Raises:
            NotFound: there is none.
        """
        if op_id not in self._operations:
            raise NotFound(f"sandbox {self.log.sandbox} has no operation {op_id}")
        return self._operations[op_id]

    async def ask(self, req: Mapping[str, Any], asked: Asked, data: bytes | None = None) -> tuple[Operation, bool]:
        """Begin an operation, or find the one that was asked for before.

        Args:
            req: the operation as JSON; its `op` says which.
            asked: by whom.
            data: bytes that go with it.
        Returns:
            the operation, and whether its result was there before: then nothing runs.
        Raises:
            Divergence: another operation was asked for under this name or at this place.
            OutcomeUnknown: it was begun, and how it ended was never learnt.
            AgentLost: nobody answers in the sandbox any more.
        """
        shown = dict(self._hiding.value(req))
        if data is not None:
            stored = self._hiding.data(data)
            shown["data"] = await asyncio.get_running_loop().run_in_executor(DISK, self.log.blobs.keep, whole(stored))
        digest = sha256(canonical(shown))
        # no pause from here to the end: this is the frontier
        known = self._known(asked)
        if known is not None:
            return self._again(known, digest, shown)
        if self.lost is not None:
            raise self.lost
        operation = Operation(asked.op_id or f"op-{secrets.token_hex(8)}", shown, digest, self.log.blobs)
        intent = None
        if req["op"] not in READS:
            intent = self._note("op.intent", operation, asked)
            operation.seq = intent.seq
        self._enter(operation, asked.place)
        self.active = time.monotonic()
        self._begin(self._carry(operation, intent, asked, partial(self._perform, operation, req, data)))
        return operation, False

    def _known(self, asked: Asked) -> Operation | None:
        if asked.op_id is not None and asked.op_id in self._operations:
            return self._operations[asked.op_id]
        return self._places.get(asked.place) if asked.place is not None else None

    def _again(self, known: Operation, digest: str, shown: Mapping[str, Any]) -> tuple[Operation, bool]:
        if known.req_sha256 != digest:
            raise Divergence(
                known.seq, known.req_sha256, digest,
                f"record {known.seq} of sandbox {self.log.sandbox} is {_short(known.req)}, and {_short(shown)} was"
                " asked for in its place: fork there, or ask under another name",
            )  # fmt: skip
        if known.res is not None and known.res["state"] == "unknown":
            raise OutcomeUnknown(known.op_id, known.res["error"]["message"])
        return known, known.res is not None

    def _note(self, kind: Any, operation: Operation, asked: Asked, res: Mapping[str, Any] | None = None) -> Record:
        place = {} if asked.place is None else {"place": list(asked.place)}
        return self.log.add(
            kind, op_id=operation.op_id, actor=asked.actor, rollout=asked.rollout, req=operation.req,
            res={**(res or {}), **place} or None,
        )  # fmt: skip

    async def _carry(self, operation: Operation, intent: Record | None, asked: Asked, work: Work) -> None:
        try:
            if intent is not None:
                await self.log.durable(intent)
            res = await work()
            if intent is not None:
                record = self.log.add("op.result", op_id=operation.op_id, actor=asked.actor, res=res)
            else:
                record = self._note(operation.req["op"], operation, asked, res)
                operation.seq = record.seq
            await self.log.durable(record)
            process = operation.process
            operation.finish(res)
            if self._performer is not None:
                await self._performer.settle(operation, process)
        except LogError as error:  # what was not kept is not told
            operation.fail(error)
        except asyncio.CancelledError:
            operation.fail(OutcomeUnknown(operation.op_id, f"the edge ended during operation {operation.op_id}"))
            raise
        except Exception as error:  # a defect of ours: the sandbox goes on, the caller hears of it
            logger.exception("operation failed", extra={"sandbox": self.log.sandbox, "op_id": operation.op_id})
            operation.fail(SandboxError(f"the platform failed in operation {operation.op_id}: {error!r}"))
        finally:
            self.active = time.monotonic()

    async def _perform(self, operation: Operation, req: Mapping[str, Any], data: bytes | None) -> Mapping[str, Any]:
        async def work() -> Mapping[str, Any]:
            if req["op"] in self._extra:
                return await self._extra[req["op"]](operation)
            if self._performer is None:
                raise _lost(self.log.sandbox)
            if "of" in req:
                return await self._performer.feed(self.find(req["of"]), req, data)
            return await self._performer.perform(operation, req, data)

        return await self._safely(operation, work)

    async def _safely(self, operation: Operation, work: Work) -> Mapping[str, Any]:
        """What it returns, or what went wrong as a result."""
        try:
            return await work()
        except LogError:
            raise
        except AgentLost as error:
            if self.lost is None:
                self.lost = error
                self.log.add("agent.lost", op_id=operation.op_id, res=error_json(error))
            streams = {name: self.log.blobs.keep(kept) for name, kept in operation.partial().items()}
            return {"state": "failed", "error": error_json(error), **streams}
        except SandboxError as error:
            return {"state": "failed", "error": error_json(error)}
        except (AbyssalError, OSError) as error:
            return {"state": "failed", "error": error_json(SandboxError(f"the platform failed: {error}"))}

    async def resolve(self, op_id: str, res: Mapping[str, Any], actor: str = "local") -> None:
        """Declare how an operation of unknown outcome ended; that is logged.

        Args:
            op_id: the operation.
            res: at least `state`, done or failed; for a command also its exit code.
            actor: who declares it.
        Raises:
            NotFound: no such operation.
            SandboxError: its outcome is known.
        """
        operation = self.find(op_id)
        full = {**_blank(operation.req), **res, "declared": True}
        if operation.res == full:  # said twice
            return
        if operation.res is None or operation.res["state"] != "unknown":
            raise SandboxError(f"the outcome of operation {op_id} is not unknown: nothing is to be resolved")
        await self.log.append("op.resolved", op_id=op_id, actor=actor, res=full)
        operation.finish(full)

    async def tty_input(self, operation: Operation, data: bytes, actor: str) -> None:
        """Type into a terminal; the input is durable before it is typed."""
        if self._performer is None:
            raise _lost(self.log.sandbox)
        await self._performer.type(operation, data, actor)

    async def close(self) -> None:
        """End what runs here, without a result, and close the log."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.log.close()


def _lost(sandbox: str) -> SandboxLost:
    return SandboxLost(
        f"sandbox {sandbox} ended with its host or edge: its log is there, and its snapshots can start anew"
    )


def _place(record: Record) -> tuple[str, int] | None:
    place = (record.res or {}).get("place")
    return None if place is None else (place[0], place[1])


def _unknown(op_id: str) -> dict[str, Any]:
    message = f"operation {op_id} was begun and how it ended was never learnt: inspect the sandbox, then resolve it"
    return {"state": "unknown", "error": error_json(OutcomeUnknown(op_id, message))}


def _blank(req: Mapping[str, Any]) -> dict[str, Any]:
    """What a declared result has where nothing is declared."""
    if req["op"] != "exec":
        return {}
    nothing = {"bytes": 0, "truncated_from": None, "sha256": sha256(b""), "inline": ""}
    return {
        "exit_code": 0, "signal": None, "timed_out": False, "limit": None, "duration_ms": 0,
        "usage": {"cpu_ms": None, "peak_memory": None}, "stdout": nothing, "stderr": nothing,
    }  # fmt: skip


def _short(req: Mapping[str, Any]) -> str:
    text = canonical(req).decode()
    return text if len(text) <= 160 else f"{text[:157]}..."
