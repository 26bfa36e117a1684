"""E2B's in-sandbox daemon, `envd`, answered by us (sandbox.md 5).

E2B reaches it through a proxy; here a header names the sandbox. It speaks the Connect protocol with JSON. A process
number is the place of our operation in the log.
"""

from __future__ import annotations

import base64
import json
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute
from starlette.routing import Route as HttpRoute

from abyssal.sandbox import errors
from abyssal.sandbox.api import Exit, ProcessEvent, Stdout
from abyssal.sandbox.errors import BadRequest, NotFound, SandboxError
from abyssal.sandbox.held import rfc3339
from abyssal.sandbox.http.access import Caller, Unauthorised
from abyssal.sandbox.http.bodies import body, body_json
from abyssal.sandbox.http.gate import Gate
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.perform import READ_CAP

_CODES: Mapping[type[SandboxError], str] = {
    errors.NotFound: "not_found",
    errors.BadRequest: "invalid_argument",
    errors.PathError: "invalid_argument",
    errors.Unsupported: "unimplemented",
    errors.PolicyDenied: "permission_denied",
    errors.Rejected: "resource_exhausted",
    errors.QuotaExceeded: "resource_exhausted",
    errors.LimitHit: "resource_exhausted",
    errors.Expired: "unavailable",
    errors.AgentLost: "unavailable",
    Unauthorised: "unauthenticated",
}
_STATUS = {"not_found": 404, "invalid_argument": 400, "unimplemented": 501, "resource_exhausted": 429,
           "unavailable": 502, "unauthenticated": 401, "already_exists": 409,
           "permission_denied": 403}  # fmt: skip
_KINDS = {"file": "FILE_TYPE_FILE", "folder": "FILE_TYPE_DIRECTORY", "link": "FILE_TYPE_SYMLINK"}
_SIGNALS = {"SIGNAL_SIGTERM": 15, "SIGNAL_SIGKILL": 9}
JSON = Mapping[str, Any]


class Envd:
    """The routes of `envd`, over our edge."""

    def __init__(self, gate: Gate):
        self._gate, self._edge = gate, gate.edge

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        unary: dict[str, Callable[[str, JSON], Awaitable[JSON]]] = {
            "process.Process/List": self._processes,
            "process.Process/SendInput": self._input,
            "process.Process/SendSignal": self._signal,
            "process.Process/CloseStdin": self._close_stdin,
            "process.Process/Update": self._resize,
            "filesystem.Filesystem/Stat": self._stat,
            "filesystem.Filesystem/ListDir": self._list_dir,
            "filesystem.Filesystem/MakeDir": self._make_dir,
            "filesystem.Filesystem/Move": self._move,
            "filesystem.Filesystem/Remove": self._remove,
        }
        return [
            *(HttpRoute(f"/{name}", self._unary(work), methods=["POST"]) for name, work in unary.items()),
            HttpRoute("/process.Process/Start", self._stream(self._start), methods=["POST"]),
            HttpRoute("/process.Process/Connect", self._stream(self._again), methods=["POST"]),
            HttpRoute("/files", self._file_read, methods=["GET"]),
            HttpRoute("/files", self._file_write, methods=["POST"]),
        ]

    async def _inside(self, request: Request) -> tuple[str, Caller]:
        """The sandbox that a call is for, and who calls."""
        caller = self._gate.access.caller(request.headers.get("x-access-token"))
        sandbox = request.headers.get("e2b-sandbox-id", "")
        await self._gate.allowed(caller, sandbox)
        return sandbox, caller

    def _unary(self, work: Callable[[str, JSON], Awaitable[JSON]]) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            try:
                sandbox, _ = await self._inside(request)
                return JSONResponse(await work(sandbox, await body_json(request)))
            except SandboxError as error:
                code, told = _connect_error(error)
                return JSONResponse(told, _STATUS.get(code, 500))

        return handler

    def _stream(self, work: Callable[[Request, str, JSON], Awaitable[int]]) -> Callable[[Request], Awaitable[Response]]:
        """A call whose answer is a stream of messages: those of an operation."""

        async def handler(request: Request) -> Response:
            try:
                sandbox, _ = await self._inside(request)
                data = await body(request)
                pid = await work(request, sandbox, json.loads(data[5:]))  # one message behind its envelope
            except SandboxError as error:
                return StreamingResponse(_failed(error), media_type="application/connect+json")
            return StreamingResponse(self._events(sandbox, pid), media_type="application/connect+json")

        return handler

    async def _events(self, sandbox: str, pid: int) -> AsyncIterator[bytes]:
        operation = await self._find(sandbox, pid)
        name = "pty" if operation["req"].get("tty") else None
        yield _message({"event": {"start": {"pid": pid}}})
        try:
            async for event in self._edge.events(sandbox, operation["op_id"]):
                yield _message({"event": _event(event, name)})
            yield _envelope(2, {})
        except SandboxError as error:
            yield _envelope(2, {"error": _connect_error(error)[1]})

    async def _start(self, request: Request, sandbox: str, value: JSON) -> int:
        process = value.get("process") or {}
        req: dict[str, Any] = {"op": "exec", "argv": [process.get("cmd", "/bin/sh"), *process.get("args", [])]}
        if process.get("cwd"):
            req["cwd"] = process["cwd"]
        if process.get("envs"):
            req["env"] = dict(process["envs"])
        if value.get("stdin"):
            req["stdin"] = True
        if value.get("pty"):
            size = value["pty"].get("size", {})
            req["tty"] = [size.get("rows", 24), size.get("cols", 80)]
        user = _user(request)
        if user in ("root", "user"):
            req["user"] = user
        if "connect-timeout-ms" in request.headers:
            req["timeout"] = int(request.headers["connect-timeout-ms"]) / 1000
        begun = await self._edge.begin(sandbox, req, Asked(actor="e2b"))
        return begun.seq

    async def _again(self, request: Request, sandbox: str, value: JSON) -> int:
        pid = _pid(value)
        await self._find(sandbox, pid)
        return pid

    async def _find(self, sandbox: str, pid: int) -> JSON:
        for operation in await self._edge.operations(sandbox):
            if operation["seq"] == pid and operation["req"]["op"] == "exec":
                return operation
        raise NotFound(f"no process {pid}")

    async def _running(self, sandbox: str, value: JSON) -> str:
        operation = await self._find(sandbox, _pid(value))
        if operation["state"] != "running":
            raise NotFound(f"process {operation['seq']} has ended")
        return str(operation["op_id"])

    async def _processes(self, sandbox: str, value: JSON) -> JSON:
        found = []
        for operation in await self._edge.operations(sandbox):
            req = operation["req"]
            if operation["state"] == "running" and req["op"] == "exec":
                config = {"cmd": req["argv"][0], "args": req["argv"][1:], "envs": req.get("env", {})}
                found.append({"pid": operation["seq"], "config": {**config, "cwd": req.get("cwd")}})
        return {"processes": found}

    async def _input(self, sandbox: str, value: JSON) -> JSON:
        op_id, given = await self._running(sandbox, value), value.get("input") or {}
        if "pty" in given:
            await self._edge.type(sandbox, op_id, base64.b64decode(given["pty"]), "e2b")
        else:
            data = base64.b64decode(given.get("stdin", ""))
            await self._edge.call(sandbox, {"op": "stdin", "of": op_id}, Asked(actor="e2b"), data)
        return {}

    async def _signal(self, sandbox: str, value: JSON) -> JSON:
        op_id = await self._running(sandbox, value)
        number = _SIGNALS.get(str(value.get("signal")))
        if number is None:
            raise BadRequest(f"signal {value.get('signal')!r} is unknown")
        await self._edge.call(sandbox, {"op": "signal", "of": op_id, "signal": number}, Asked(actor="e2b"))
        return {}

    async def _close_stdin(self, sandbox: str, value: JSON) -> JSON:
        op_id = await self._running(sandbox, value)
        await self._edge.call(sandbox, {"op": "stdin", "of": op_id, "end": True}, Asked(actor="e2b"))
        return {}

    async def _resize(self, sandbox: str, value: JSON) -> JSON:
        op_id, size = await self._running(sandbox, value), (value.get("pty") or {}).get("size", {})
        req = {"op": "resize", "of": op_id, "rows": size.get("rows", 24), "columns": size.get("cols", 80)}
        await self._edge.call(sandbox, req, Asked(actor="e2b"))
        return {}

    async def _file(self, sandbox: str, op: str, **fields: Any) -> JSON:
        return (await self._edge.call(sandbox, {"op": f"file.{op}", **fields}, Asked(actor="e2b"))).res

    async def _stat(self, sandbox: str, value: JSON) -> JSON:
        return {"entry": _entry((await self._file(sandbox, "stat", path=_path(value)))["value"])}

    async def _list_dir(self, sandbox: str, value: JSON) -> JSON:
        found, left = [], [(_path(value), int(value.get("depth") or 1))]
        while left:
            path, depth = left.pop(0)
            for entry in (await self._file(sandbox, "list", path=path))["value"]:
                found.append(_entry(entry))
                if depth > 1 and entry["kind"] == "folder":
                    left.append((entry["path"], depth - 1))
        return {"entries": found}

    async def _make_dir(self, sandbox: str, value: JSON) -> JSON:
        path = _path(value)
        try:
            await self._file(sandbox, "stat", path=path)
        except NotFound:
            await self._file(sandbox, "make_folder", path=path)
            return {"entry": _entry((await self._file(sandbox, "stat", path=path))["value"])}
        raise _Exists(f"{path} is there already")

    async def _move(self, sandbox: str, value: JSON) -> JSON:
        to = str(value.get("destination", ""))
        await self._file(sandbox, "move", path=str(value.get("source", "")), to=to)
        return {"entry": _entry((await self._file(sandbox, "stat", path=to))["value"])}

    async def _remove(self, sandbox: str, value: JSON) -> JSON:
        await self._file(sandbox, "remove", path=_path(value))
        return {}

    async def _file_read(self, request: Request) -> Response:
        try:
            sandbox, _ = await self._inside(request)
            path, data = request.query_params.get("path", ""), b""
            while True:
                req = {"op": "file.read", "path": path, "offset": len(data), "length": READ_CAP}
                part = (await self._edge.call(sandbox, req, Asked(actor="e2b"))).streams["data"].data
                data += part
                if len(part) < READ_CAP:
                    return Response(data, media_type="application/octet-stream")
        except SandboxError as error:
            return self._plain(error)

    async def _file_write(self, request: Request) -> Response:
        try:
            sandbox, _ = await self._inside(request)
            written = []
            for path, data in (await _uploads(request)).items():
                req = {"op": "file.write", "path": path, "mode": 0o644}
                await self._edge.call(sandbox, req, Asked(actor="e2b"), data)
                written.append({"name": posixpath.basename(path), "type": "file", "path": path})
            return JSONResponse(written)
        except SandboxError as error:
            return self._plain(error)

    def _plain(self, error: SandboxError) -> Response:
        status = _STATUS.get(_connect_error(error)[0], 500)
        return JSONResponse({"code": status, "message": str(error)}, status)


async def _uploads(request: Request) -> dict[str, bytes]:
    """Files of a request: raw with the path in the address, or as a form whose parts are named by their paths."""
    path = request.query_params.get("path")
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return {path or "": await body(request)}
    async with request.form(max_files=10_000) as form:
        parts = [part for part in form.getlist("file") if isinstance(part, UploadFile)]
        return {path or part.filename or "": await part.read() for part in parts}


class _Exists(SandboxError):  # noqa: N818
    """A folder that is there already."""


def _connect_error(error: SandboxError) -> tuple[str, dict[str, str]]:
    code = "already_exists" if isinstance(error, _Exists) else _CODES.get(type(error), "internal")
    return code, {"code": code, "message": str(error)}


def _envelope(flags: int, value: JSON) -> bytes:
    data = json.dumps(value).encode()
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def _message(value: JSON) -> bytes:
    return _envelope(0, value)


async def _failed(error: SandboxError) -> AsyncIterator[bytes]:
    yield _envelope(2, {"error": _connect_error(error)[1]})


def _event(event: ProcessEvent, terminal: str | None) -> dict[str, Any]:
    if isinstance(event, Exit):
        status = f"exit status {event.code}" if event.signal is None else f"signal: {event.signal}"
        told = {"exitCode": event.code, "exited": event.signal is None, "status": status}
        if event.timed_out:
            told["error"] = "the command's time was over"
        return {"end": told}
    name = terminal or ("stdout" if isinstance(event, Stdout) else "stderr")
    return {"data": {name: base64.b64encode(event.data).decode()}}


def _entry(stat: JSON) -> dict[str, Any]:
    entry = {
        "name": posixpath.basename(stat["path"].rstrip("/")), "path": stat["path"],
        "type": _KINDS.get(stat["kind"], "FILE_TYPE_UNSPECIFIED"), "size": str(stat["size"]), "mode": stat["mode"],
        "permissions": f"{stat['mode']:o}", "modifiedTime": rfc3339(stat["mtime"]),
    }  # fmt: skip
    return entry | ({"symlinkTarget": stat["target"]} if stat["target"] else {})


def _pid(value: JSON) -> int:
    pid = (value.get("process") or {}).get("pid")
    if not isinstance(pid, int):
        raise BadRequest("a process is chosen by its pid")
    return pid


def _path(value: JSON) -> str:
    return str(value.get("path", ""))


def _user(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme != "Basic":
        return None
    try:
        return base64.b64decode(token).decode().partition(":")[0]
    except ValueError:
        raise BadRequest("Authorization is no base 64") from None
