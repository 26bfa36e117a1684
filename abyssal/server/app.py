"""The HTTP application: routes, keys, limits, and errors in the vendor's shape."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import Completer
from abyssal.server import openai, sse
from abyssal.server.errors import ApiError, api_error
from abyssal.server.names import ALIASES

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """What an operator decides.

    Attributes:
        api_keys: SHA-256 digests of the keys that may call; none leaves the door open.
        legacy_names: whether deepseek-chat and deepseek-reasoner are answered.
        body_bytes: largest body.
        requests: most requests at once; more are told to come back.
    """

    api_keys: tuple[bytes, ...] = ()
    legacy_names: bool = True
    body_bytes: int = 64 << 20
    requests: int = 256


def digest(key: str) -> bytes:
    """How a key is kept."""
    return hashlib.sha256(key.encode()).digest()


class Server:
    """The application around one completer."""

    def __init__(self, completer: Completer, settings: Settings | None = None):
        self.completer = completer
        self.settings = settings or Settings()
        self.running = 0
        self._began = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        chat = ("/v1/chat/completions", "/chat/completions", "/beta/chat/completions")
        routes = [
            *(Route(path, self._guarded(self._chat), methods=["POST"]) for path in chat),
            Route("/v1/models", self._guarded(self._models)),
            Route("/models", self._guarded(self._models)),
            Route("/v1/models/{name}", self._guarded(self._model)),
            Route("/health", self._health),
        ]
        handlers: Any = {HTTPException: _http_error, Exception: _bug}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(self, handler: Handler) -> Handler:
        async def call(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except AbyssalError as error:
                shown = api_error(error)
                return JSONResponse(shown.openai(), shown.status, shown.headers)
            except ClientDisconnect:
                return Response(status_code=499)

        return call

    def _check_key(self, request: Request) -> None:
        if not self.settings.api_keys:
            return
        header = request.headers.get("authorization", "")
        given = header[7:] if header.lower().startswith("bearer ") else request.headers.get("x-api-key", "")
        found = [hmac.compare_digest(digest(given), known) for known in self.settings.api_keys]
        if not any(found):
            text = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key")

    async def _body(self, request: Request) -> Any:
        limit = self.settings.body_bytes
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body is larger than {limit} bytes: send less")
            parts.append(part)
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None

    async def _chat(self, request: Request) -> Response:
        asked = openai.asked(
            openai.read_body(await self._body(request)), self.completer, legacy=self.settings.legacy_names
        )
        if self.running >= self.settings.requests:
            raise ApiError(429, f"{self.running} requests are running: come back", code="overloaded", retry_after=5)
        headers = {"x-abyssal-model": self.completer.model}
        if asked.deprecated:
            headers["Deprecation"] = "true"
        if asked.body.stream:
            chunks = openai.stream(self.completer, asked)
            first = await anext(chunks, None)  # what is refused is refused here, with a status
            headers |= {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(self._counted(first, chunks), media_type="text/event-stream", headers=headers)
        self.running += 1
        try:
            body, repairs = await _unless_gone(request, openai.complete(self.completer, asked))
        finally:
            self.running -= 1
        if repairs:
            headers["x-abyssal-repaired"] = ", ".join(repairs)
        return JSONResponse(body, headers=headers)

    async def _counted(self, first: bytes | None, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.running += 1
        try:
            if first is not None:
                yield first
            async for chunk in sse.kept_alive(chunks):
                yield chunk
        finally:
            self.running -= 1

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "abyssal"}

    async def _models(self, _: Request) -> Response:
        names = [self.completer.model, *(name for name in ALIASES if name != self.completer.model)]
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.completer.model and name not in ALIASES:
            raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")
        return JSONResponse(self._entry(name))

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.completer.model, "running": self.running})


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of some work, which is given up when the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=0.25))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = ApiError(error.status_code, f"{error.detail}: see the list of routes in the documentation")
    return JSONResponse(shown.openai(), error.status_code, error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    number = secrets.token_hex(8)
    shown = ApiError(500, f"something broke here; the log has it under {number}", code=number)
    return JSONResponse(shown.openai(), 500)


def keys(texts: Sequence[str]) -> tuple[bytes, ...]:
    """Digests of API keys."""
    return tuple(digest(text) for text in texts)
