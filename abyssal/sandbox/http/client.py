"""An edge over HTTP as a `Service`; what is asked again after a broken connection runs once all the same."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx2

from abyssal.sandbox import shapes
from abyssal.sandbox.api import Duplex, ProcessEvent
from abyssal.sandbox.errors import BadRequest, SandboxError, Timeout
from abyssal.sandbox.http import routes
from abyssal.sandbox.http.tunnel import Tunnel
from abyssal.sandbox.log.blobs import Kept
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.service import JSON, Answer, Begun, Wanted

RECONNECT_S = 20.0
PAUSE_S = 0.1


class HttpService:
    """Speaks to an edge's server.

    Args:
        url: of the server.
        token: of the project, or None.
        socket: path of a unix socket to go through.
        reconnect: seconds for which a server that does not answer is asked again.
    """

    def __init__(
        self, url: str, token: str | None = None, *, socket: Path | None = None, reconnect: float = RECONNECT_S
    ):
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        transport = None if socket is None else httpx2.AsyncHTTPTransport(uds=str(socket))
        self._http = httpx2.AsyncClient(
            base_url=url, headers=headers, transport=transport,
            timeout=httpx2.Timeout(10.0, read=None), limits=httpx2.Limits(max_connections=None),
        )  # fmt: skip
        self._url, self._reconnect = url, reconnect
        self._token, self._socket = token, socket

    @classmethod
    async def open(cls, url: str, token: str | None = None, *, socket: Path | None = None) -> Self:
        """Connect, and see that somebody answers.

        Raises:
            Timeout: nobody does.
        """
        service = cls(url, token, socket=socket)
        try:
            await service.health()
        except BaseException:
            await service.close()
            raise
        return service

    async def _send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """A request, again while nobody answers; every one of ours may be sent twice."""
        until = time.monotonic() + self._reconnect
        while True:
            try:
                response = await self._http.request(method, path, **options)
            except httpx2.TransportError as error:
                if time.monotonic() > until:
                    raise Timeout(f"nobody answers at {self._url} ({error}): is the edge running?") from None
                await asyncio.sleep(PAUSE_S)
                continue
            if response.status_code >= 400:
                raise _error(response.status_code, response.content)
            return response

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        response = await self._send(method, path, **options)
        return response.json() if response.content else None

    async def health(self) -> JSON:
        """Whether somebody answers."""
        return await self._json("GET", "/health")

    async def capabilities(self) -> JSON:
        return await self._json("GET", "/v1/capabilities")

    async def create(self, wanted: Wanted, asked: Asked) -> JSON:
        return await self._json(
            "POST", "/v1/sandboxes", json=shapes.plain(wanted), headers=routes.asked_headers(_named(asked))
        )

    async def list(self, labels: Mapping[str, str]) -> Sequence[JSON]:
        return await self._json("GET", "/v1/sandboxes", params=dict(labels))

    async def info(self, sandbox: str) -> JSON:
        return await self._json("GET", _own(sandbox))

    async def destroy(self, sandbox: str, actor: str = "local") -> None:
        await self._json("DELETE", _own(sandbox))

    async def begin(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Begun:
        if req["op"] != "exec":
            raise BadRequest(f"only commands can be begun without waiting, not {req['op']}")
        found = await self._json(
            "POST", f"{_own(sandbox)}/exec", json={**_exec_body(req, data), "mode": "detach"},
            headers=routes.asked_headers(_named(asked)),
        )  # fmt: skip
        return Begun(found["op_id"], found["seq"], found["replayed"])

    async def result(self, sandbox: str, begun: Begun) -> Answer:
        params = {"wait": "1", "replayed": "1" if begun.replayed else "0"}
        path = f"{_own(sandbox)}/ops/{quote(begun.op_id, safe='')}"
        return routes.answer_of(await self._json("GET", path, params=params))

    async def call(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Answer:
        headers = routes.asked_headers(_named(asked))
        if req["op"] == "exec":
            return routes.answer_of(
                await self._json("POST", f"{_own(sandbox)}/exec", json=_exec_body(req, data), headers=headers)
            )
        route = routes.BY_OP[req["op"]]
        path = f"{_own(sandbox)}/{route.path.replace('{of}', quote(str(req.get('of', '')), safe=''))}"
        params = {
            name: str(int(req[name])) if kind is not str else req[name]
            for name, kind in route.query.items() if req.get(name) is not None
        }  # fmt: skip
        options: dict[str, Any] = {"params": params, "headers": headers}
        if route.fields:
            options["json"] = {name: req[name] for name in route.fields if name in req}
        if route.body:
            options["content"] = data or b""
        response = await self._send(route.method, path, **options)
        if route.reply:
            value = {
                "op_id": response.headers[routes.OP_ID], "seq": int(response.headers[routes.SEQ]),
                "replayed": response.headers[routes.REPLAYED] == "1", "res": {"state": "done"}, "streams": {},
            }  # fmt: skip
            content = response.content
            kept = Kept(content, len(content), len(content))
            return replace(routes.answer_of(value | {"streams": {"data": routes.kept_json(kept)}}))
        return routes.answer_of(response.json())

    async def events(self, sandbox: str, op_id: str, stdout: int = 0, stderr: int = 0) -> AsyncIterator[ProcessEvent]:
        path = f"{_own(sandbox)}/ops/{quote(op_id, safe='')}/events"
        until = time.monotonic() + self._reconnect
        while True:
            try:
                async with self._http.stream("GET", path, params={"from": f"{stdout},{stderr}"}) as response:
                    if response.status_code >= 400:
                        raise _error(response.status_code, await response.aread())
                    async for place, name, value in _server_sent(response):
                        until = time.monotonic() + self._reconnect
                        stdout, stderr = (int(number) for number in place.split(","))
                        if name == "error":
                            raise shapes.error_of(value)
                        yield routes.event_of(name, value)
                        if name == "exit":
                            return
            except httpx2.TransportError as error:
                if time.monotonic() > until:
                    raise Timeout(f"nobody answers at {self._url} ({error})") from None
            await asyncio.sleep(PAUSE_S)

    async def type(self, sandbox: str, op_id: str, data: bytes, actor: str = "local") -> None:
        await self._json("POST", f"{_own(sandbox)}/ops/{quote(op_id, safe='')}/stdin", content=data)

    async def dial(self, sandbox: str, port: int, actor: str = "local") -> Duplex:
        return await Tunnel.open(self._url, f"{_own(sandbox)}/ports/{port}", self._token, self._socket)

    async def operations(self, sandbox: str) -> Sequence[JSON]:
        return await self._json("GET", f"{_own(sandbox)}/ops")

    async def stored(self, sandbox: str, op_id: str, name: str) -> Kept:
        return routes.kept_of(await self._json("GET", f"{_own(sandbox)}/ops/{quote(op_id, safe='')}/stored/{name}"))

    async def resolve(self, sandbox: str, op_id: str, res: JSON, actor: str = "local") -> None:
        await self._json("POST", f"{_own(sandbox)}/ops/{quote(op_id, safe='')}/resolve", json=dict(res))

    async def log(self, sandbox: str, from_seq: int = 0, *, follow: bool = False) -> AsyncIterator[JSON]:
        params = {"from": str(from_seq), "follow": str(int(follow))}
        async with self._http.stream("GET", f"{_own(sandbox)}/log", params=params) as response:
            if response.status_code >= 400:
                raise _error(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                yield json.loads(line)

    async def group(
        self, label: str, value: str, action: str, actor: str = "local", only: str | None = None
    ) -> Sequence[str]:
        found = await self._json("POST", f"/v1/groups/{quote(f'{label}={value}', safe='')}:{action}")
        return found["sandboxes"]

    async def close(self) -> None:
        await self._http.aclose()


def _own(sandbox: str) -> str:
    return f"/v1/sandboxes/{quote(sandbox, safe='')}"


def _named(asked: Asked) -> Asked:
    """With a name, so that a request may be sent again."""
    if asked.op_id is not None or asked.place is not None:
        return asked
    return replace(asked, op_id=f"op-{secrets.token_hex(8)}")


def _exec_body(req: JSON, data: bytes | None) -> dict[str, Any]:
    body = {name: req[name] for name in routes.EXEC_FIELDS if name in req}
    if req.get("stdin"):
        body["stdin_open"] = True
    if data is not None:
        body["stdin_base64"] = base64.b64encode(data).decode()
    return body


def _error(status: int, content: bytes) -> SandboxError:
    try:
        return shapes.error_of(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return SandboxError(f"the server answered {status}: {content[:200].decode(errors='replace')}")


async def _server_sent(response: httpx2.Response) -> AsyncIterator[tuple[str, str, Any]]:
    """Events of a stream: id, name, JSON."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields["id"], fields["event"], json.loads(fields["data"])
            fields = {}
