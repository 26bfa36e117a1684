"""The HTTP application: routes, keys, bodies, and errors in the vendor's shape."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import Completer
from abyssal.chat.turn import THINK_MAX_CONTEXT
from abyssal.encoding.snapshots import EFFORTS
from abyssal.server import answers, anthropic, completions, docs, openai, openapi, responses, sse, tokens
from abyssal.server.errors import ApiError, api_error
from abyssal.server.metrics import CONTENT_TYPE
from abyssal.server.names import ALIASES, Named, resolve
from abyssal.server.openapi import Handler, Operation
from abyssal.server.service import Service, Turn
from abyssal.server.settings import Settings, caller_of

WEB = Path(__file__).parent / "web"
ANYBODY = "anybody"  # the caller, where no keys are set
GONE = 499  # the client left; nobody sees it
POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
log = logging.getLogger("abyssal.server")


class Asked(Protocol):
    """A checked request of any wire."""

    @property
    def named(self) -> Named:
        """What its model name means."""

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""


class Begun(Protocol):
    """A request on its way: a chat turn, or the run of a text completion."""

    @property
    def id(self) -> str:
        """Names it in headers, logs and traces."""

    @property
    def notes(self) -> Sequence[str]:
        """What is done differently from what was asked."""

    @property
    def repaired(self) -> Sequence[str]:
        """What was mended so far."""


class Wire(Protocol):
    """One API: a module with these functions."""

    def asked(self, data: Any, service: Service) -> Any:
        """Check and translate a request's JSON."""

    def stream(self, begun: Any, asked: Any) -> AsyncIterator[bytes]:
        """The answer as events; the first comes when the request is accepted."""

    def whole(self, begun: Any, asked: Any) -> AsyncIterator[dict[str, Any] | None]:
        """None once the request is accepted, then the answer."""


class Server:
    """The application around one completer."""

    def __init__(self, completer: Completer, settings: Settings | None = None):
        self.settings = settings or Settings()
        self.service = Service(completer, self.settings)
        self.completer = completer
        self._responses = responses.Memory()
        self._began = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        listed = [
            Route(path, operation.handler if operation.free else self._guarded(operation.handler, openapi.plain(path)),
                  methods=[operation.method])
            for operation in self.operations()
            for path in operation.paths
        ]  # fmt: skip
        routes = [
            *listed,
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
            Route("/", _page("index.html")),
            Route("/trace", _page("trace.html")),
            Route("/web/{name}", _asset),
        ]
        cors = Middleware(
            CORSMiddleware, allow_origins=list(self.settings.cors), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "x-abyssal-model", "x-abyssal-repaired", "x-abyssal-notes", "deprecation",
                            "retry-after"],
        )  # fmt: skip
        handlers: Any = {HTTPException: self._http_error, Exception: self._bug}
        return Starlette(routes=routes, exception_handlers=handlers, middleware=[cors] if self.settings.cors else [])

    def operations(self) -> list[Operation]:
        """All routes but the pages: what the router serves, and what /openapi.json and /docs tell."""
        question = {"messages": [{"role": "user", "content": "Hello"}]}
        return [
            Operation(
                paths=("/v1/chat/completions", "/chat/completions", "/beta/chat/completions"),
                handler=self._answering(openai, self._turn),
                summary="Answer a conversation (Chat Completions)",
                group="OpenAI", body=openai.ChatBody, example=question, answers=(answers.ChatAnswer,),
                event=answers.ChatChunk, done=True, errors=openapi.RUN_ERRORS,
            ),
            Operation(
                paths=("/v1/completions", "/completions", "/beta/completions"),
                handler=self._answering(completions, self._run),
                summary="Continue a text, fill in its middle, or score it",
                group="OpenAI", body=completions.CompletionBody, example={"prompt": "Once upon"},
                answers=(answers.TextAnswer,), event=answers.TextChunk, done=True, errors=openapi.RUN_ERRORS,
            ),
            Operation(
                paths=("/v1/responses",), handler=self._answering(responses, self._response),
                summary="Answer a conversation (Responses)",
                group="OpenAI", body=responses.ResponsesBody, example={"input": "Hello"},
                answers=(answers.ResponseAnswer,), event=answers.ResponseEvent, errors=openapi.RUN_ERRORS,
            ),
            Operation(
                paths=("/v1/models", "/models"), handler=self._models,
                summary="The names under which the model answers",
                group="OpenAI", answers=(answers.OpenAIModels, answers.AnthropicModels), vendor="either",
            ),
            Operation(
                paths=("/v1/models/{name:path}",), handler=self._model,
                summary="One name of the model",
                group="OpenAI", answers=(answers.OpenAIModel, answers.AnthropicModel), vendor="either",
                params={"name": "A name of the model."}, errors=(400, 404),
            ),
            Operation(
                paths=("/v1/messages", "/anthropic/v1/messages"), handler=self._answering(anthropic, self._turn),
                summary="Answer a conversation (Messages)",
                group="Anthropic", body=anthropic.MessagesBody, example={"max_tokens": 256, **question},
                answers=(answers.MessageAnswer,), event=answers.StreamEvent, errors=openapi.RUN_ERRORS,
                vendor="anthropic",
            ),
            Operation(
                paths=("/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"), handler=self._count_tokens,
                summary="Tokens of the prompt of a request to Messages",
                group="Anthropic", body=anthropic.CountBody, example=question, answers=(answers.Counted,),
                errors=(*openapi.BODY_ERRORS, 404), vendor="anthropic",
            ),
            Operation(
                paths=("/tokenize",), handler=self._tokenize,
                summary="Token ids of a text, or of a conversation's prompt",
                group="Tokens", body=tokens.TokenizeBody, example={"prompt": "Hello"}, answers=(answers.Tokens,),
                errors=openapi.BODY_ERRORS,
            ),
            Operation(
                paths=("/detokenize",), handler=self._detokenize,
                summary="Text of token ids",
                group="Tokens", body=tokens.DetokenizeBody, example={"tokens": [0, 1]}, answers=(answers.Detokenized,),
                errors=openapi.BODY_ERRORS,
            ),
            Operation(
                paths=("/tokenizer_info",), handler=self._tokenizer_info,
                summary="What a client must know to use the ids",
                group="Tokens", answers=(answers.TokenizerInfo,),
            ),
            Operation(
                paths=("/traces",), handler=self._traces,
                summary="Your last requests that are kept",
                group="Operation", answers=(answers.TraceList,),
            ),
            Operation(
                paths=("/traces/{id}",), handler=self._trace,
                summary="The exact tokens of one of them, and what was chosen for each",
                group="Operation", answers=(answers.TraceWhole,), params={"id": "An answer's x-request-id."},
                errors=(404,),
            ),
            Operation(
                paths=("/metrics",), handler=self._metrics,
                summary="Counters, gauges and histograms for Prometheus",
                group="Operation", answers=(), media="text/plain",
            ),
            Operation(
                paths=("/health",), handler=self._health,
                summary="Whether the process lives",
                group="Operation", answers=(answers.Health,), free=True,
            ),
            Operation(
                paths=("/ready",), handler=self._ready,
                summary="Whether requests are taken; 503 while it ends",
                group="Operation", answers=(answers.Ready,), busy=answers.Ready, free=True,
            ),
        ]  # fmt: skip

    # what surrounds every handler

    def _guarded(self, handler: Handler, path: str) -> Handler:
        async def call(request: Request) -> Response:
            try:
                request.state.caller = self._caller(request)
                response = await handler(request)
            except AbyssalError as error:
                response = _refused(request, api_error(error))
            except ClientDisconnect:
                response = Response(status_code=GONE)
            except RecursionError:
                response = _refused(request, ApiError(400, "the body is nested too deeply: flatten it"))
            # the route's own path: what clients fill in would make new counters without end
            self.service.metrics.http.labels(self.completer.model, path, response.status_code).inc()
            return response

        return call

    def _caller(self, request: Request) -> str:
        if not self.settings.api_keys:
            return ANYBODY
        header = request.headers.get("authorization", "")
        key = header[7:] if header.lower().startswith("bearer ") else request.headers.get("x-api-key", "")
        caller = caller_of(key, self.settings.api_keys)
        if caller is None:
            text = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key")
        return caller

    async def _body(self, request: Request) -> Any:
        limit, parts, size = self.settings.body_bytes, [], 0
        large = ApiError(413, f"the body is larger than {limit} bytes: send less")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise large
        try:
            async with asyncio.timeout(self.settings.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise large
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.settings.body_s:g} s: send it faster") from None
        try:
            return _json(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None

    # chat turns

    def _turn(self, asked: Any, request: Request) -> Turn:
        return self.service.turn(asked.request, request.state.caller, request.url.path)

    def _run(self, asked: Any, request: Request) -> completions.Run:
        return completions.Run(asked, self.service, request.state.caller)

    def _response(self, asked: Any, request: Request) -> responses.Run:
        return responses.Run(asked, self.service, self._responses, request.state.caller)

    def _answering(self, wire: Wire, begin: Callable[[Any, Request], Begun]) -> Handler:
        """A handler: wire to our types, our events back to the wire."""

        async def call(request: Request) -> Response:
            asked: Asked = wire.asked(await self._body(request), self.service)
            turn = begin(asked, request)
            # both vendors' clients look for an id, under different names
            headers = {"x-request-id": turn.id, "request-id": turn.id, "x-abyssal-model": self.completer.model}
            if asked.named.deprecated:
                headers["Deprecation"] = "true"
                log.warning("a model name that the vendor switched off", extra={"request": turn.id})
            if turn.notes:
                headers["x-abyssal-notes"] = ", ".join(turn.notes)
            if asked.streams:
                pieces = wire.stream(turn, asked)
                first = await anext(pieces)  # what is refused is refused here, with a status
                headers |= _repaired(turn)
                filler = getattr(wire, "FILLER", sse.COMMENT)
                pause = self.settings.keep_alive_s
                return sse.Stream(pieces, first=first, failed=self._teller(request, _as_event), filler=filler,
                                  pause=pause, headers=headers)  # fmt: skip
            answers = wire.whole(turn, asked)
            await anext(answers)
            return await self._waited(request, answers, turn, headers)

        return call

    async def _waited(
        self, request: Request, answers: AsyncIterator[dict[str, Any] | None], turn: Begun, headers: dict[str, str]
    ) -> Response:
        """The answer at once if it comes soon, else with empty lines before it."""
        answer = asyncio.ensure_future(anext(answers))
        left = asyncio.ensure_future(sse.left(request.receive))
        kept = False
        try:
            await asyncio.wait([answer, left], timeout=self.settings.keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                body = sse.compact(answer.result())
                return Response(body, headers=headers | _repaired(turn), media_type="application/json")
            if left.done():
                raise ClientDisconnect
            kept = True
        finally:
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            if not kept:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)
                await answers.aclose()  # type: ignore[attr-defined]

        async def told() -> AsyncIterator[bytes]:
            yield sse.compact(await answer)

        async def close() -> None:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            await answers.aclose()  # type: ignore[attr-defined]

        return sse.Stream(told(), failed=self._teller(request, sse.compact), close=close, filler=b"\n",
                          pause=self.settings.keep_alive_s, headers=headers,
                          media_type="application/json")  # fmt: skip

    def _teller(self, request: Request, write: Callable[[dict[str, Any]], bytes]) -> Callable[[Exception], bytes]:
        """How an error is told when the status is out already."""

        def tell(error: Exception) -> bytes:
            told = api_error(error) if isinstance(error, AbyssalError) else self._logged(error, request)
            return write(_shape(request, told))

        return tell

    # models, traces, operation

    def _entry(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "abyssal",
            "context_length": self.completer.context,
            "efforts": [effort for effort in EFFORTS if effort != "max" or self.completer.context >= THINK_MAX_CONTEXT],
        }

    async def _models(self, request: Request) -> Response:
        names = [self.completer.model, *(name for name in ALIASES if name != self.completer.model)]
        if "anthropic-version" not in request.headers:
            return JSONResponse({"object": "list", "data": [self._entry(name) for name in names]})
        entries = [self._anthropic_entry(name) for name in names]
        return JSONResponse({"data": entries, "has_more": False, "first_id": names[0], "last_id": names[-1]})

    def _anthropic_entry(self, name: str) -> dict[str, Any]:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._began))
        return {"type": "model", "id": name, "display_name": name, "created_at": created, "lifecycle": "active",
                "max_input_tokens": self.completer.context}  # fmt: skip

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        resolve(name, self.completer.model, legacy=self.settings.legacy_names)
        anthropic = "anthropic-version" in request.headers
        return JSONResponse(self._anthropic_entry(name) if anthropic else self._entry(name))

    async def _count_tokens(self, request: Request) -> Response:
        # in a thread: without a tokenizer, the engine behind a gateway is asked
        body = await self._body(request)
        return JSONResponse(await asyncio.to_thread(anthropic.counted, body, self.service, request.state.caller))

    async def _tokenize(self, request: Request) -> Response:
        ids = await asyncio.to_thread(tokens.tokenize, await self._body(request), self.completer)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.completer.context})

    async def _detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": tokens.detokenize(await self._body(request), self.completer)})

    async def _tokenizer_info(self, _: Request) -> Response:
        return JSONResponse(tokens.information(self.completer))

    async def _traces(self, request: Request) -> Response:
        found = self.service.traces.of(request.state.caller)
        return JSONResponse({"traces": [trace.summary(self.completer.model) for trace in found]})

    async def _trace(self, request: Request) -> Response:
        trace = self.service.traces.get(request.path_params["id"], request.state.caller)
        if trace is None:
            raise ApiError(404, f"no trace {request.path_params['id']!r} is kept: only the last few are")
        return JSONResponse(trace.whole(self.completer))

    async def _metrics(self, _: Request) -> Response:
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE)

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.completer.model, "running": self.service.limits.running})

    async def _ready(self, _: Request) -> Response:
        draining = self.service.limits.draining
        return JSONResponse({"ready": not draining}, 503 if draining else 200)

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(openapi.describe(self.operations(), self.settings))

    async def _docs(self, request: Request) -> Response:
        text = docs.page(self.operations(), self.settings, self.completer.model, str(request.base_url).rstrip("/"))
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    # errors that no handler raised

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.service.metrics.http.labels(self.completer.model, "none", error.status_code).inc()
        text = f"{request.method} {request.url.path}: {error.detail}; /docs lists the routes"
        response = _refused(request, ApiError(error.status_code, text))
        response.headers.update(error.headers or {})
        return response

    async def _bug(self, request: Request, error: Exception) -> Response:
        return _refused(request, self._logged(error, request))

    def _logged(self, error: Exception, request: Request) -> ApiError:
        """What a client sees of a bug: where the log has it."""
        number = f"err_{secrets.token_hex(8)}"
        log.error("a bug", exc_info=error, extra={"error": number, "route": request.url.path})
        return ApiError(500, f"something broke here; the log has it under {number}", code=number)


def _shape(request: Request, error: ApiError) -> dict[str, Any]:
    if "/messages" in request.url.path or "anthropic-version" in request.headers:
        return error.anthropic(f"req_{secrets.token_hex(12)}")
    return error.openai()


def _refused(request: Request, error: ApiError) -> Response:
    # what is left of a slow body would keep the connection for as long as the client likes
    close = {"Connection": "close"} if error.status == 408 else {}
    return JSONResponse(_shape(request, error), error.status, error.headers | close)


def _json(raw: bytes) -> Any:
    """A body's JSON: numbers are numbers, and text can be encoded.

    Lone surrogates become U+FFFD, as browsers write them: clients cut texts between the halves of a pair, and a
    conversation that has one in its history would be refused for ever.

    Raises:
        ValueError, RecursionError: it is none.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    value = json.loads(raw.decode("utf-8-sig"), parse_constant=refuse)
    if _SURROGATE.search(raw):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    return value


def _repaired(turn: Begun) -> dict[str, str]:
    return {"x-abyssal-repaired": ", ".join(turn.repaired)} if turn.repaired else {}


def _as_event(shape: dict[str, Any]) -> bytes:
    return sse.event(shape) if "type" in shape else sse.data(shape)


def _page(name: str) -> Handler:
    async def call(_: Request) -> Response:
        return FileResponse(WEB / name, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    return call


async def _asset(request: Request) -> Response:
    path = WEB / request.path_params["name"]
    if path.suffix == ".html" or path.name not in {entry.name for entry in WEB.iterdir()}:
        raise HTTPException(404)
    return FileResponse(path, headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"})
