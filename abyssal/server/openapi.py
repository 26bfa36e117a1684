"""What the routes are, as OpenAPI 3.1: one list of operations serves the router, the description and /docs.

Bodies are the pydantic models that the wires check requests with; `answers` has what comes back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

import abyssal
from abyssal.server.answers import AnthropicError, OpenAIError
from abyssal.server.settings import Settings

Handler = Callable[[Request], Awaitable[Response]]
Vendor = Literal["openai", "anthropic", "either"]
JSON, EVENTS = "application/json", "text/event-stream"
_REF = "#/components/schemas/{model}"
_ABOUT = """\
Fields that are not listed are ignored. Numbers and booleans may also come as text, and as each other where nothing is
lost: `"0.5"` for 0.5, `1` for true. JSON's extensions NaN and Infinity are refused.

A model that is not listed under `/v1/models` is not served; any name that begins with `claude` is.

Streams send comments (`ping` events for Anthropic) while nothing comes, and answers that are not streamed may have
empty lines before them."""

_STATUS = {
    400: "The body is malformed, or asks for something that is not supported or cannot be done.",
    401: "The API key is missing or wrong.",
    402: "The key's tokens are used up.",
    404: "The model, or what the path names, does not exist.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    422: "A value is out of range; the message begins with its path.",
    429: "Too many requests are running: come back.",
    500: "A bug, or the engine failed; the log has it under the number in the message.",
    503: "There is no memory for the request now, or the server is shutting down: come back.",
}
_HEADERS = {
    "x-request-id": "Names the request in the log, and its trace under /traces.",
    "x-abyssal-model": "The model that really answered.",
    "x-abyssal-notes": "What was done differently from what was asked, if anything.",
    "x-abyssal-repaired": "What was mended in the conversation, or in the answer before its headers went out.",
    "Deprecation": "true if the request used a model name that the vendor has switched off.",
}
_ALWAYS = ("x-request-id", "x-abyssal-model")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Paths that one handler answers, and what to tell about them.

    Attributes:
        paths: the usual one first; the others do the same.
        handler: answers; not yet guarded by keys and metrics.
        summary: what it is for, in a line.
        group: heading under which it is listed.
        body: what is sent, or None for a GET.
        example: a body to try, beside the model's name.
        answers: the 200 answer; several if it depends on who asks.
        media: its media type.
        event: what the stream's events carry, if the answer can be streamed.
        done: whether `[DONE]` comes after them.
        errors: statuses of refusals, beside those that keys and broken servers give.
        vendor: whose shape errors have; either where `anthropic-version` decides.
        params: path parameters and what they are.
        free: whether it needs no key and is not counted.
        busy: the answer of 503, where that is no error.
    """

    paths: Sequence[str]
    handler: Handler
    summary: str
    group: str
    answers: Sequence[type[BaseModel]]
    body: type[BaseModel] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    media: str = JSON
    event: type[BaseModel] | None = None
    done: bool = False
    errors: Sequence[int] = ()
    vendor: Vendor = "openai"
    params: Mapping[str, str] = field(default_factory=dict)
    free: bool = False
    busy: type[BaseModel] | None = None

    @property
    def method(self) -> str:
        """GET or POST."""
        return "GET" if self.body is None else "POST"


# what a request with a body can meet, and one that runs the model
BODY_ERRORS = (400, 408, 413, 422)
RUN_ERRORS = (*BODY_ERRORS, 402, 404, 429, 503)


def plain(path: str) -> str:
    """A path as OpenAPI writes it: without starlette's convertors."""
    return path.replace(":path}", "}")


def describe(operations: Iterable[Operation], settings: Settings) -> dict[str, Any]:
    """The OpenAPI description of these operations, as this server is set up."""
    operations = list(operations)
    known: list[type[BaseModel]] = [OpenAIError, AnthropicError]
    for operation in operations:
        known += [model for model in (operation.body, *operation.answers, operation.event, operation.busy) if model]
    refs, found = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(known)], ref_template=_REF
    )
    schemas = {name: _untitled(schema) for name, schema in sorted(found["$defs"].items())}
    ref = {model: dict(refs[model, "validation"]) for model in known}
    paths: dict[str, Any] = {}
    for operation in operations:
        for path in operation.paths:
            paths.setdefault(plain(path), {})[operation.method.lower()] = _operation(operation, path, ref, settings)
    description: dict[str, Any] = {
        "openapi": "3.1.1",
        "info": {"title": "abyssal", "version": abyssal.__version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if settings.api_keys:
        description["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return description


def _operation(
    operation: Operation, path: str, ref: Mapping[type[BaseModel], dict[str, Any]], settings: Settings
) -> dict[str, Any]:
    statuses = [*operation.errors]
    if not operation.free:
        statuses += [500, *([401] if settings.api_keys else [])]
    if 402 in statuses and settings.tokens_per_key is None:
        statuses.remove(402)
    shapes: dict[str, type[BaseModel]] = {"openai": OpenAIError, "anthropic": AnthropicError}
    errors = [ref[shape] for vendor, shape in shapes.items() if operation.vendor in (vendor, "either")]
    responses: dict[str, Any] = {"200": _answer(operation, ref)}
    for status in sorted(statuses):
        response: dict[str, Any] = {"description": _STATUS[status], "content": {JSON: {"schema": _any_of(errors)}}}
        if status in (429, 503):
            response["headers"] = {
                "Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer"}}
            }
        responses[str(status)] = response
    if operation.busy is not None:
        responses["503"] = {"description": "Not now.", "content": {JSON: {"schema": ref[operation.busy]}}}
    words = [word.strip("{}") for word in plain(path).replace(".", "_").split("/") if word]
    made: dict[str, Any] = {
        "operationId": "_".join([operation.method.lower(), *words]),
        "summary": operation.summary,
        "tags": [operation.group],
        "responses": responses,
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in operation.params.items()
    ]
    if operation.vendor == "either":
        text = "Asks for Anthropic's shape, whatever its value."
        schema = {"type": "string"}
        parameters.append({"name": "anthropic-version", "in": "header", "description": text, "schema": schema})
    if parameters:
        made["parameters"] = parameters
    if operation.body is not None:
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": ref[operation.body]}}}
    if path != operation.paths[0]:
        made["description"] = f"Does what `{operation.paths[0]}` does."
    if settings.api_keys and not operation.free:
        made["security"] = [{"bearer": []}, {"x-api-key": []}]
    return made


def _answer(operation: Operation, ref: Mapping[type[BaseModel], dict[str, Any]]) -> dict[str, Any]:
    schema = _any_of([ref[answer] for answer in operation.answers]) if operation.answers else {"type": "string"}
    answer: dict[str, Any] = {"description": "The answer.", "content": {operation.media: {"schema": schema}}}
    if operation.event is not None:
        # OpenAPI 3.1 has no place for the items of a stream: by custom, the schema is that of one event
        data = {"type": "string", "contentMediaType": JSON, "contentSchema": ref[operation.event]}
        done = {"const": "[DONE]", "description": "Ends the stream."}
        answer["content"][EVENTS] = {
            "schema": {
                "type": "object",
                "description": "If `stream` is true: one of the server-sent events.",
                "properties": {
                    "event": {"type": "string"}, "data": {"anyOf": [data, done]} if operation.done else data,
                },
                "required": ["data"],
            }
        }  # fmt: skip
        answer["headers"] = {
            name: {"description": text, "required": name in _ALWAYS, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        }
    return answer


def _any_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _untitled(schema: Any) -> Any:
    """A schema without the titles that pydantic makes of names."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _untitled(value) for name, value in inner.items()} if key == "properties" else _untitled(inner)
        for key, inner in schema.items()
        if not (key == "title" and isinstance(inner, str))
    }
