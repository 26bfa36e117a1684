"""What each operation does to a box, and what its result holds; the log is `recorded`'s business."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import AsyncIterator, Mapping
from typing import Any

from abyssal.sandbox.api import Box, Command, Exit, Limits, Process, Stdout
from abyssal.sandbox.errors import BadRequest, NotFound, Unsupported
from abyssal.sandbox.lasting import Left, Settles
from abyssal.sandbox.log.blobs import Kept, whole
from abyssal.sandbox.log.hiding import Hiding, HidingStream
from abyssal.sandbox.log.output import Budget, Output
from abyssal.sandbox.log.records import sha256
from abyssal.sandbox.log.spill import STREAMS, Spill, name_of
from abyssal.sandbox.log.writer import DISK, Log
from abyssal.sandbox.operation import THROTTLE, Operation
from abyssal.sandbox.shapes import plain

# they change nothing, so they need no intent: one record with what was found
READS = frozenset({"file.read", "file.list", "file.stat", "file.download"})
READ_CAP = 16 << 20  # bytes that one read gives at most; who wants more asks again with an offset
DONE: Mapping[str, Any] = {"state": "done"}
SPILL = "running"  # below the log's folder


class Performer:
    """Runs operations on a box.

    Args:
        box, log, limits, hiding, budget: of the sandbox.
        lasting: whether commands outlive this edge.
    """

    def __init__(self, box: Box, log: Log, limits: Limits, hiding: Hiding, budget: Budget, *, lasting: bool = False):
        self._box, self._log, self._limits, self._hiding, self._budget = box, log, limits, hiding, budget
        self._lasting = lasting

    async def perform(self, operation: Operation, req: Mapping[str, Any], data: bytes | None) -> Mapping[str, Any]:
        """Do it and return its result.

        Raises:
            SandboxError: it failed.
        """
        name, files = req["op"], self._box.files
        match name:
            case "exec":
                return await self._run(operation, req, data)
            case "file.read":
                length = READ_CAP if req.get("length") is None else min(req["length"], READ_CAP)
                found = await files.read(req["path"], req.get("offset", 0), length)
                return {"state": "done", "data": await self._keep(whole(found))}
            case "file.stat":
                return {"state": "done", "value": plain(await files.stat(req["path"]))}
            case "file.list":
                return {"state": "done", "value": [plain(entry) for entry in await files.list(req["path"])]}
            case "file.download":
                tar = b"".join([piece async for piece in files.download(req["path"])])
                return {"state": "done", "data": await self._keep(whole(tar))}
            case "file.write":
                content = data or b""
                await files.write(req["path"], content, req.get("mode", 0o644))
                stored = self._hiding.data(content)
                return {"state": "done", "sha256": sha256(stored), "bytes": len(stored), "mode": req.get("mode", 0o644)}
            case "file.upload":
                await files.upload(req["path"], _once(data or b""))
                return DONE
            case "file.make_folder":
                await files.make_folder(req["path"])
                return DONE
            case "file.move":
                await files.move(req["path"], req["to"])
                return DONE
            case "file.remove":
                await files.remove(req["path"])
                return DONE
        raise BadRequest(f"operation {name!r} is unknown")

    async def _keep(self, kept: Kept) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(DISK, self._log.blobs.keep, kept)

    async def _run(self, operation: Operation, req: Mapping[str, Any], data: bytes | None) -> Mapping[str, Any]:
        tty = req.get("tty")
        command = Command(
            argv=tuple(req["argv"]), cwd=req.get("cwd"), user=req.get("user"), env=req.get("env") or {},
            stdin=data is not None or bool(req.get("stdin")), timeout=req.get("timeout"),
            tty=None if tty is None else (tty[0], tty[1]), keep=bool(req.get("keep")),
            name=name_of(operation.op_id) if self._lasting else "",
        )  # fmt: skip
        if tty is not None and "tty" not in self._box.features:
            raise Unsupported(f"engine {self._box.placed.engine} has no terminals")
        process = await self._box.start(command)
        operation.process = process
        outputs = operation.listen(self._limits.output, self._budget)
        operation.started.set()
        if tty is not None:
            self._log.add("tty.open", op_id=operation.op_id, res={"rows": tty[0], "columns": tty[1]})
        feeder = asyncio.create_task(_feed(process, data)) if data is not None else None
        hiding = {name: self._hiding.stream() for name in STREAMS}
        try:
            return await self._to_end(operation, process, outputs, hiding)
        finally:
            if feeder is not None:
                feeder.cancel()

    async def go_on(self, operation: Operation, left: Left) -> Mapping[str, Any]:
        """Go on with a command that an earlier edge of this host began, behind the output that it kept."""
        outputs = operation.listen(self._limits.output, self._budget)
        hiding = {name: self._hiding.stream() for name in STREAMS}
        kept = {name: self._spill(operation).read(name) for name in STREAMS}
        begins = {"stdout": left.stdout, "stderr": left.stderr}
        for name in STREAMS:
            outputs[name].add(hiding[name].feed(kept[name]))
            if (lost := begins[name] - len(kept[name])) > 0:
                outputs[name].lose(lost)
        operation.process = await left.join(len(kept["stdout"]), len(kept["stderr"]))
        operation.started.set()
        operation.grew()
        return await self._to_end(operation, operation.process, outputs, hiding)

    def _spill(self, operation: Operation) -> Spill:
        return Spill(self._log.folder / SPILL, name_of(operation.op_id), self._limits.output)

    async def settle(self, operation: Operation, process: Process | None) -> None:
        """The result of a command is kept."""
        if self._lasting and isinstance(process, Settles):
            await process.settle()
            self._spill(operation).remove()

    async def _to_end(
        self,
        operation: Operation,
        process: Process,
        outputs: Mapping[str, Output],
        hiding: Mapping[str, HidingStream],
    ) -> Mapping[str, Any]:
        terminal = operation.req.get("tty") is not None
        ended = await self._read(operation, process, outputs, hiding, terminal=terminal)
        if terminal:
            self._log.add("tty.close", op_id=operation.op_id)
        if ended.limit is not None:
            self._log.add("limit", op_id=operation.op_id, res={"limit": ended.limit})
        return {
            "state": "cancelled" if operation.cancelled and ended.signal is not None else "done",
            "exit_code": ended.code, "signal": ended.signal, "timed_out": ended.timed_out, "limit": ended.limit,
            "duration_ms": ended.duration_ms, "usage": plain(ended.usage),
            "stdout": await self._keep(outputs["stdout"].kept()),
            "stderr": await self._keep(outputs["stderr"].kept()),
        }  # fmt: skip

    async def _read(
        self,
        operation: Operation,
        process: Process,
        outputs: Mapping[str, Output],
        hiding: Mapping[str, HidingStream],
        *,
        terminal: bool,
    ) -> Exit:
        spill = self._spill(operation) if self._lasting else None
        async for event in process.events():
            if isinstance(event, Exit):
                for name, stream in hiding.items():
                    outputs[name].add(stream.end())
                operation.grew()
                return event
            name = "stdout" if isinstance(event, Stdout) else "stderr"
            shown = hiding[name].feed(event.data)
            outputs[name].add(shown)
            if terminal and shown and not outputs[name].over:  # durable before anybody sees it
                await self._log.append("tty.out", op_id=operation.op_id, res={"data": _text(shown)})
            if spill is not None:
                spill.add(name, event.data)
            operation.grew()
            if outputs[name].over:
                await asyncio.sleep(len(event.data) / THROTTLE)
        raise NotFound(f"engine {self._box.placed.engine} ended a command without saying how")

    async def feed(self, target: Operation, req: Mapping[str, Any], data: bytes | None) -> Mapping[str, Any]:
        """Something for a command that runs: input, the end of input, a signal, another size of its terminal.

        Raises:
            NotFound: it does not run any more.
        """
        await target.started.wait()
        process = target.process
        if process is None:
            raise NotFound(f"operation {target.op_id} does not run any more")
        match req["op"]:
            case "stdin":
                if data:
                    await process.write(data)
                if req.get("end"):
                    await process.close_stdin()
            case "signal":
                target.cancelled = target.cancelled or req["signal"] in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
                await process.signal(req["signal"])
            case "resize":
                await process.resize(req["rows"], req["columns"])
            case other:
                raise BadRequest(f"operation {other!r} is unknown")
        return DONE

    async def type(self, target: Operation, data: bytes, actor: str) -> None:
        """Input of a terminal, durable before it is typed."""
        await target.started.wait()
        if target.process is None:
            raise NotFound(f"terminal {target.op_id} is closed")
        shown = self._hiding.data(data)
        await self._log.append("tty.in", op_id=target.op_id, actor=actor, res={"data": _text(shown)})
        if target.process is not None:
            await target.process.write(data)


async def _feed(process: Process, data: bytes) -> None:
    await process.write(data)
    await process.close_stdin()


async def _once(data: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), 1 << 18):
        yield data[begin : begin + (1 << 18)]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
