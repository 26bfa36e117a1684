"""The HTTP server of an edge (sandbox.md 5)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as HttpRoute

from abyssal.sandbox import shapes
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.errors import BadRequest, NotFound, SandboxError
from abyssal.sandbox.http import routes
from abyssal.sandbox.http.access import Access, Caller, Project, Unauthorised
from abyssal.sandbox.http.bodies import body, body_json, check, exec_request
from abyssal.sandbox.http.e2b import E2b
from abyssal.sandbox.http.envd import Envd
from abyssal.sandbox.http.gate import Gate
from abyssal.sandbox.http.metrics import Metrics
from abyssal.sandbox.http.routes import ROUTES, Route
from abyssal.sandbox.http.terminal import terminal
from abyssal.sandbox.http.tunnel import tunnel
from abyssal.sandbox.replay import branch, rerun, view
from abyssal.sandbox.service import Begun, Wanted

QUIET_S = 10.0
Handler = Callable[[Request, Caller], Awaitable[Response]]
_OWN = "/v1/sandboxes/{sandbox}"


class SandboxServer:
    """The application over an edge.

    Args:
        edge: of this host.
        projects: who may call; none for an address that only this machine's user reaches.
    """

    def __init__(self, edge: Edge, projects: Sequence[Project] = ()):
        self.edge = edge
        self.gate = Gate(edge, Access(projects, edge.token_key))
        self.metrics = Metrics(edge)

    def app(self) -> Starlette:
        """The ASGI application."""
        own = [
            ("GET", "/v1/capabilities", self._capabilities),
            ("POST", "/v1/sandboxes", self._create),
            ("GET", "/v1/sandboxes", self._list),
            ("GET", _OWN, self._info),
            ("DELETE", _OWN, self._destroy),
            ("POST", f"{_OWN}/exec", self._exec),
            ("GET", f"{_OWN}/ops", self._operations),
            ("GET", f"{_OWN}/ops/{{op}}", self._operation),
            ("GET", f"{_OWN}/ops/{{op}}/events", self._events),
            ("GET", f"{_OWN}/ops/{{op}}/stored/{{name}}", self._stored),
            ("POST", f"{_OWN}/ops/{{op}}/resolve", self._resolve),
            ("GET", f"{_OWN}/log", self._log),
            ("POST", "/v1/replays", self._replay),
            ("POST", "/v1/groups/{label}:{action}", self._group),
        ]
        table: list[BaseRoute] = [
            HttpRoute(path, self._guarded(handler), methods=[method]) for method, path, handler in own
        ]
        table += [
            HttpRoute(f"{_OWN}/{route.path.replace('{of}', '{op}')}", self._guarded(self._call(route)),
                      methods=[route.method])
            for route in ROUTES
        ]  # fmt: skip
        table += [
            HttpRoute("/health", self._health, methods=["GET"]),
            HttpRoute("/metrics", self._guarded(self._metrics), methods=["GET"]),
            WebSocketRoute(f"{_OWN}/tty", lambda socket: terminal(self.gate, socket)),
            WebSocketRoute(f"{_OWN}/ports/{{port:int}}", lambda socket: tunnel(self.gate, socket)),
            *E2b(self.gate).routes(),
            *Envd(self.gate).routes(),
        ]
        return Starlette(routes=table)

    # handlers

    def _guarded(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                caller = self.gate.caller(request.headers)
                if "sandbox" in request.path_params:
                    await self.gate.allowed(caller, request.path_params["sandbox"])
                elif caller.sandbox is not None:
                    raise Unauthorised("the token of one sandbox is good for that sandbox alone")
                return await handler(request, caller)
            except Unauthorised as error:
                return JSONResponse(routes.error_body(error), 401, {"WWW-Authenticate": "Bearer"})
            except SandboxError as error:
                headers = {"Retry-After": "1"} if routes.status_of(error) == 503 else None
                return JSONResponse(routes.error_body(error), routes.status_of(error), headers)
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"edge": self.edge.id, "pid": os.getpid()})

    async def _metrics(self, request: Request, caller: Caller) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _capabilities(self, request: Request, caller: Caller) -> Response:
        return JSONResponse(await self.edge.capabilities())

    async def _create(self, request: Request, caller: Caller) -> Response:
        value = await body_json(request)
        wanted = Wanted(
            shapes.spec(value.get("spec", {})), value.get("engine"), value.get("snapshot"),
            shapes.texts(value.get("secrets", {}), "secrets"),
        )  # fmt: skip
        if wanted.snapshot is not None:
            await self.gate.allowed(caller, str(wanted.snapshot).partition("/")[0])
        await self.gate.check_quota(caller)
        info = await self.edge.create(wanted, routes.asked_of(request.headers, caller.actor))
        await self.gate.allowed(caller, info["id"])  # a name that is another's
        return JSONResponse({**info, "token": self.gate.access.sandbox_token(info["id"], caller.actor)}, 201)

    async def _list(self, request: Request, caller: Caller) -> Response:
        found = await self.edge.list(dict(request.query_params))
        return JSONResponse([info for info in found if self.gate.mine(caller, info)])

    async def _info(self, request: Request, caller: Caller) -> Response:
        return JSONResponse(await self.edge.info(request.path_params["sandbox"]))

    async def _destroy(self, request: Request, caller: Caller) -> Response:
        await self.edge.destroy(request.path_params["sandbox"], caller.actor)
        return Response(status_code=204)

    async def _exec(self, request: Request, caller: Caller) -> Response:
        sandbox = request.path_params["sandbox"]
        req, data, mode = exec_request(await body_json(request))
        asked = routes.asked_of(request.headers, caller.actor)
        begin = time.monotonic()
        try:
            begun = await self.edge.begin(sandbox, req, asked, data)
            if mode == "detach":
                return JSONResponse(shapes.plain(begun), 202)
            if mode == "stream":
                return self._event_stream(sandbox, begun.op_id, 0, 0, begun)
            answer = await self.edge.result(sandbox, begun)
        except SandboxError as error:
            self.metrics.operation("exec", type(error).__name__, time.monotonic() - begin)
            raise
        self.metrics.operation("exec", "replayed" if answer.replayed else "done", time.monotonic() - begin)
        return JSONResponse(routes.answer_json(answer))

    def _call(self, route: Route) -> Handler:
        async def handler(request: Request, caller: Caller) -> Response:
            sandbox = request.path_params["sandbox"]
            req: dict[str, Any] = {"op": route.op}
            if "op" in request.path_params:
                req["of"] = request.path_params["op"]
            req |= _query(request, route)
            if route.fields:
                value = await body_json(request)
                req |= {name: value[name] for name in route.fields if name in value}
            check(req)
            data = await body(request) if route.body else None
            asked = routes.asked_of(request.headers, caller.actor)
            if route.op == "stdin" and await self._is_terminal(sandbox, req["of"]):
                await self.edge.type(sandbox, req["of"], data or b"", caller.actor)
                return Response(status_code=204)
            begin = time.monotonic()
            try:
                answer = await self.edge.call(sandbox, req, asked, data)
            except SandboxError as error:
                self.metrics.operation(route.op, type(error).__name__, time.monotonic() - begin)
                raise
            self.metrics.operation(route.op, "replayed" if answer.replayed else "done", time.monotonic() - begin)
            if route.reply:
                headers = {
                    routes.OP_ID: answer.op_id, routes.SEQ: str(answer.seq),
                    routes.REPLAYED: "1" if answer.replayed else "0",
                }  # fmt: skip
                return Response(answer.streams["data"].data, 200, headers, "application/octet-stream")
            return JSONResponse(routes.answer_json(answer))

        return handler

    async def _is_terminal(self, sandbox: str, op_id: str) -> bool:
        return self.edge.request(sandbox, op_id).get("tty") is not None

    async def _operations(self, request: Request, caller: Caller) -> Response:
        return JSONResponse(list(await self.edge.operations(request.path_params["sandbox"])))

    async def _operation(self, request: Request, caller: Caller) -> Response:
        """Look up; with `wait=1`, until it has ended."""
        sandbox, op_id = request.path_params["sandbox"], request.path_params["op"]
        for entry in await self.edge.operations(sandbox):
            if entry["op_id"] == op_id:
                if entry["state"] == "running" and request.query_params.get("wait") != "1":
                    return JSONResponse(dict(entry))
                replayed = request.query_params.get("replayed") == "1"
                answer = await self.edge.result(sandbox, Begun(op_id, entry["seq"], replayed))
                return JSONResponse({**entry, **routes.answer_json(answer), "state": answer.res["state"]})
        raise NotFound(f"sandbox {sandbox} has no operation {op_id}")

    async def _events(self, request: Request, caller: Caller) -> Response:
        place = request.query_params.get("from") or request.headers.get("last-event-id") or "0,0"
        try:
            stdout, stderr = (int(number) for number in (*place.split(","), "0")[:2])
        except ValueError:
            raise BadRequest(f"from={place!r} is not two byte offsets, as in from=1024,0") from None
        return self._event_stream(request.path_params["sandbox"], request.path_params["op"], stdout, stderr, None)

    def _event_stream(self, sandbox: str, op_id: str, stdout: int, stderr: int, begun: Begun | None) -> Response:
        events = self.edge.events(sandbox, op_id, stdout, stderr)

        async def pieces() -> AsyncIterator[bytes]:
            at = {"stdout": stdout, "stderr": stderr}
            if begun is not None:
                yield _sse("begun", shapes.plain(begun), at)
            try:
                async for event in events:
                    name, value = routes.event_json(event)
                    if name in at:
                        at[name] = value["offset"] + len(base64.b64decode(value["base64"]))
                    yield _sse(name, value, at)
            except SandboxError as error:
                yield _sse("error", routes.error_body(error)["error"], at)

        return StreamingResponse(_kept_open(pieces()), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store"})  # fmt: skip

    async def _stored(self, request: Request, caller: Caller) -> Response:
        params = request.path_params
        return JSONResponse(routes.kept_json(await self.edge.stored(params["sandbox"], params["op"], params["name"])))

    async def _resolve(self, request: Request, caller: Caller) -> Response:
        value = dict(await body_json(request))
        if value.get("state") not in ("done", "failed"):
            raise BadRequest("state has to be done or failed")
        params = request.path_params
        await self.edge.resolve(params["sandbox"], params["op"], value, caller.actor)
        return Response(status_code=204)

    async def _log(self, request: Request, caller: Caller) -> Response:
        """Records, one JSON a line."""
        query = {"from": int, "follow": int}
        found = {name: _number(request, name) for name in query if name in request.query_params}
        records = self.edge.log(
            request.path_params["sandbox"], found.get("from", 0), follow=bool(found.get("follow", 0))
        )

        async def lines() -> AsyncIterator[bytes]:
            async for record in records:
                yield json.dumps(record).encode() + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def _replay(self, request: Request, caller: Caller) -> Response:
        """`{"sandbox", "mode": "view" | "rerun" | "branch", "seq", "normalisers"}`."""
        value = await body_json(request)
        sandbox, mode = str(value.get("sandbox")), value.get("mode", "view")
        await self.gate.allowed(caller, sandbox)
        if mode == "view":
            return JSONResponse({"rows": list(await view(self.edge, sandbox))})
        await self.gate.check_quota(caller)
        if mode == "rerun":
            normalisers = value.get("normalisers", [])
            found = await rerun(self.edge, sandbox, normalisers=normalisers, actor=caller.actor)
            if not value.get("keep"):
                await self.edge.destroy(found.sandbox, caller.actor)
            return JSONResponse(found.json())
        if mode == "branch" and isinstance(value.get("seq"), int):
            return JSONResponse({"sandbox": await branch(self.edge, sandbox, value["seq"], actor=caller.actor)}, 201)
        raise BadRequest("mode is view, rerun, or branch with seq")

    async def _group(self, request: Request, caller: Caller) -> Response:
        """A label as `job=grpo-7`, or the job alone."""
        label, action = request.path_params["label"], request.path_params["action"]
        name, found, value = label.partition("=")
        name, value = (name, value) if found else ("job", label)
        only = None if self.gate.access.open else caller.actor
        return JSONResponse({"sandboxes": list(await self.edge.group(name, value, action, caller.actor, only))})


def _sse(name: str, value: Mapping[str, Any], at: Mapping[str, int]) -> bytes:
    place = f"{at['stdout']},{at['stderr']}"
    return f"id: {place}\nevent: {name}\ndata: {json.dumps(value)}\n\n".encode()


async def _kept_open(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Comments while nothing comes."""
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(pieces))
            while not (await asyncio.wait([waiting], timeout=QUIET_S))[0]:
                yield b": quiet\n\n"
            try:
                yield waiting.result()
            except StopAsyncIteration:
                return
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await pieces.aclose()  # type: ignore[attr-defined]


def _number(request: Request, name: str) -> int:
    try:
        return int(request.query_params[name])
    except ValueError:
        raise BadRequest(f"{name}={request.query_params[name]!r} is no number") from None


def _query(request: Request, route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in route.query.items():
        if name in request.query_params:
            text = request.query_params[name]
            found[name] = (
                text if kind is str else bool(_number(request, name)) if kind is bool else _number(request, name)
            )
    return found
