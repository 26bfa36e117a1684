"""Sandboxes in the shape of E2B, for harnesses that speak to it (sandbox.md 5).

This is its API, which creates and lists sandboxes; what goes on inside is `envd`'s.

What differs from E2B's own service: no network by default, and `allow_internet_access` has to be permitted by the
host; the folder of commands is /work and not /home/user; a template is the name of an image on this host, and `base`
is the host's own root; commands go on when the client's stream breaks; there is no code interpreter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.routing import Route as HttpRoute

from abyssal.sandbox import shapes
from abyssal.sandbox.api import Network, Spec
from abyssal.sandbox.errors import NotFound, SandboxError
from abyssal.sandbox.http import routes
from abyssal.sandbox.http.access import Caller, Unauthorised
from abyssal.sandbox.http.bodies import body_json
from abyssal.sandbox.http.gate import Gate
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.service import Wanted

ENVD = "0.5.7"  # whose wire `envd` speaks: raw uploads, closing of stdin; no metadata of files yet
TEMPLATES = {"base": "host", "": "host"}
TTL = 300
JSON = Mapping[str, Any]


class E2b:
    """The routes of the API, over our edge."""

    def __init__(self, gate: Gate):
        self._gate, self._edge = gate, gate.edge

    def routes(self) -> list[BaseRoute]:
        """All of them."""
        api: list[tuple[str, str, Callable[[Request, Caller], Awaitable[Response]]]] = [
            ("POST", "/sandboxes", self._create),
            ("POST", "/v2/sandboxes", self._create),
            ("GET", "/v2/sandboxes", self._list),
            ("GET", "/sandboxes/{id}", self._detail),
            ("DELETE", "/sandboxes/{id}", self._kill),
            ("POST", "/sandboxes/{id}/timeout", self._timeout),
            ("POST", "/sandboxes/{id}/pause", self._pause),
            ("POST", "/v2/sandboxes/{id}/connect", self._connect),
            ("POST", "/sandboxes/{id}/connect", self._connect),
        ]
        return [HttpRoute(path, self._api(work), methods=[method]) for method, path, work in api]

    def _api(self, work: Callable[[Request, Caller], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            try:
                caller = self._gate.access.caller(request.headers.get("x-api-key"))
                if "id" in request.path_params:
                    await self._gate.allowed(caller, request.path_params["id"])
                return await work(request, caller)
            except Unauthorised as error:
                return JSONResponse({"code": 401, "message": str(error)}, 401)
            except SandboxError as error:
                status = routes.status_of(error)
                return JSONResponse({"code": status, "message": str(error)}, status)

        return handler

    async def _create(self, request: Request, caller: Caller) -> Response:
        value = await body_json(request)
        template = str(value.get("templateID", ""))
        network = Network("open") if value.get("allow_internet_access") is True else Network()
        spec = Spec(
            "container", image=TEMPLATES.get(template, template), network=network,
            env=shapes.texts(value.get("envVars") or {}, "envVars"),
            labels=shapes.texts(value.get("metadata") or {}, "metadata"),
            ttl=shapes.seconds(value.get("timeout", TTL), "timeout"),
        )  # fmt: skip
        await self._gate.check_quota(caller)
        asked = Asked(op_id=request.headers.get("idempotency-key"), actor=caller.actor)
        info = await self._edge.create(Wanted(spec), asked)
        return JSONResponse(self._sandbox(info, caller), 201)

    def _sandbox(self, info: JSON, caller: Caller) -> dict[str, Any]:
        return {
            "sandboxID": info["id"], "templateID": info["spec"]["image"], "clientID": self._edge.id,
            "envdVersion": ENVD, "envdAccessToken": self._gate.access.sandbox_token(info["id"], caller.actor),
            "domain": None,
        }  # fmt: skip

    def _shown(self, info: JSON) -> dict[str, Any]:
        limits = info["spec"]["limits"]
        return {
            "sandboxID": info["id"], "templateID": info["spec"]["image"], "clientID": self._edge.id,
            "envdVersion": ENVD, "startedAt": info["created"], "endAt": info["deadline"],
            "cpuCount": max(1, round(limits["cpu"])), "memoryMB": limits["memory"] >> 20,
            "diskSizeMB": limits["disk"] >> 20, "state": "paused" if info["status"] == "paused" else "running",
            "metadata": info["spec"]["labels"],
        }  # fmt: skip

    async def _list(self, request: Request, caller: Caller) -> Response:
        found = await self._edge.list({})
        mine = [info for info in found if self._gate.mine(caller, info)]
        return JSONResponse([self._shown(info) for info in mine])

    async def _detail(self, request: Request, caller: Caller) -> Response:
        info = await self._edge.info(request.path_params["id"])
        if info["status"] in ("gone", "expired"):
            raise NotFound(f"sandbox {info['id']} is gone")
        return JSONResponse(self._shown(info))

    async def _kill(self, request: Request, caller: Caller) -> Response:
        info = await self._edge.info(request.path_params["id"])
        if info["status"] in ("gone", "expired"):
            raise NotFound(f"sandbox {info['id']} is gone")
        await self._edge.destroy(info["id"], caller.actor)
        return Response(status_code=204)

    async def _timeout(self, request: Request, caller: Caller) -> Response:
        seconds = shapes.seconds((await body_json(request)).get("timeout"), "timeout")
        await self._edge.call(request.path_params["id"], {"op": "ttl", "ttl": seconds}, Asked(actor=caller.actor))
        return Response(status_code=204)

    async def _pause(self, request: Request, caller: Caller) -> Response:
        await self._edge.call(request.path_params["id"], {"op": "pause"}, Asked(actor=caller.actor))
        return Response(status_code=204)

    async def _connect(self, request: Request, caller: Caller) -> Response:
        sandbox, value = request.path_params["id"], await body_json(request)
        info = await self._edge.info(sandbox)
        if info["status"] == "paused":
            await self._edge.call(sandbox, {"op": "resume"}, Asked(actor=caller.actor))
        if "timeout" in value:
            ttl = shapes.seconds(value["timeout"], "timeout")
            await self._edge.call(sandbox, {"op": "ttl", "ttl": ttl}, Asked(actor=caller.actor))
        return JSONResponse(self._sandbox(await self._edge.info(sandbox), caller))
