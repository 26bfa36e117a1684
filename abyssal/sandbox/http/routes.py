"""Operations as HTTP calls, and their results as JSON: one table for server and client."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from abyssal.sandbox import errors
from abyssal.sandbox.api import Exit, ProcessEvent, Stderr, Stdout
from abyssal.sandbox.errors import BadRequest, SandboxError
from abyssal.sandbox.log.blobs import Kept
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.service import Answer
from abyssal.sandbox.shapes import error_json

JSON = Mapping[str, Any]
KEY, STREAM, ORDINAL, ROLLOUT = "idempotency-key", "x-sandbox-stream", "x-sandbox-ordinal", "x-sandbox-rollout"
OP_ID, SEQ, REPLAYED = "x-op-id", "x-op-seq", "x-op-replayed"


@dataclass(frozen=True)
class Route:
    """How one operation travels.

    Attributes:
        op: the operation.
        method, path: of the call, below the sandbox; `{of}` is an operation's name.
        query: fields of the request that stand in the address, and how they are read.
        fields: those that stand in a JSON body.
        body: whether the body is the operation's bytes.
        reply: whether the answer is bytes.
    """

    op: str
    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    query: Mapping[str, type] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    body: bool = False
    reply: bool = False


ROUTES: tuple[Route, ...] = (
    Route("file.read", "GET", "files", {"path": str, "offset": int, "length": int}, reply=True),
    Route("file.write", "PUT", "files", {"path": str, "mode": int}, body=True),
    Route("file.remove", "DELETE", "files", {"path": str}),
    Route("file.list", "GET", "files:list", {"path": str}),
    Route("file.stat", "GET", "files:stat", {"path": str}),
    Route("file.move", "POST", "files:move", fields=("path", "to")),
    Route("file.make_folder", "POST", "files:mkdir", fields=("path",)),
    Route("file.upload", "PUT", "tree", {"path": str}, body=True),
    Route("file.download", "GET", "tree", {"path": str}, reply=True),
    Route("pause", "POST", "pause"),
    Route("resume", "POST", "resume"),
    Route("snapshot", "POST", "snapshot", fields=("memory",)),
    Route("fork", "POST", "fork", fields=("count",)),
    Route("network", "PUT", "network", fields=("network",)),
    Route("ttl", "PUT", "ttl", fields=("ttl",)),
    Route("stdin", "POST", "ops/{of}/stdin", {"end": bool}, body=True),
    Route("signal", "POST", "ops/{of}/signal", fields=("signal",)),
    Route("resize", "POST", "ops/{of}/resize", fields=("rows", "columns")),
)
BY_OP: Mapping[str, Route] = {route.op: route for route in ROUTES}
EXEC_FIELDS = ("argv", "cwd", "env", "user", "timeout", "tty", "keep")

STATUS: Mapping[type[SandboxError], int] = {
    errors.BadRequest: 400,
    errors.PathError: 400,
    errors.PolicyDenied: 403,
    errors.NotFound: 404,
    errors.OutcomeUnknown: 409,
    errors.Divergence: 409,
    errors.LimitHit: 409,
    errors.Expired: 410,
    errors.SandboxLost: 410,
    errors.Unsupported: 422,
    errors.ImageError: 422,
    errors.QuotaExceeded: 429,
    errors.LogError: 500,
    errors.AgentLost: 502,
    errors.Rejected: 503,
    errors.Timeout: 504,
}


def status_of(error: SandboxError) -> int:
    """The HTTP status of an error."""
    return STATUS.get(type(error), 500)


def error_body(error: SandboxError) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": error_json(error)}


def asked_headers(asked: Asked) -> dict[str, str]:
    """Headers that say which operation of the client this is."""
    headers = {}
    if asked.op_id is not None:
        headers[KEY] = asked.op_id
    if asked.place is not None:
        headers |= {STREAM: asked.place[0], ORDINAL: str(asked.place[1])}
    if asked.rollout is not None:
        headers[ROLLOUT] = json.dumps(dict(asked.rollout))
    return headers


def asked_of(headers: Mapping[str, str], actor: str) -> Asked:
    """The same, read.

    Raises:
        BadRequest: a header is wrong.
    """
    try:
        ordinal = None if ORDINAL not in headers else int(headers[ORDINAL])
        rollout = None if ROLLOUT not in headers else json.loads(headers[ROLLOUT])
    except ValueError as error:
        raise BadRequest(f"{ORDINAL} is no number or {ROLLOUT} no JSON ({error})") from None
    if not (rollout is None or isinstance(rollout, dict)):
        raise BadRequest(f"{ROLLOUT} is no object")
    key = headers.get(KEY)
    if key is not None and not (0 < len(key) <= 200 and key.isprintable() and "/" not in key):
        raise BadRequest(f"{KEY} {key!r} is not up to 200 printable letters without a slash")
    return Asked(key, headers.get(STREAM), ordinal, actor, rollout)


def kept_json(kept: Kept) -> dict[str, Any]:
    """A stream: as text where it is one, else in base 64."""
    try:
        shown = {"text": kept.data.decode()}
    except UnicodeDecodeError:
        shown = {"base64": base64.b64encode(kept.data).decode()}
    return {**shown, "total": kept.total, "head": kept.head}


def kept_of(value: JSON) -> Kept:
    """The same, read."""
    data = value["text"].encode() if "text" in value else base64.b64decode(value["base64"])
    return Kept(data, value["total"], value["head"])


def answer_json(answer: Answer) -> dict[str, Any]:
    """The result of an operation; where the streams lie in the log is nobody's business."""
    res = {name: value for name, value in answer.res.items() if name not in answer.streams}
    streams = {name: kept_json(kept) for name, kept in answer.streams.items()}
    return {"op_id": answer.op_id, "seq": answer.seq, "replayed": answer.replayed, "res": res, "streams": streams}


def answer_of(value: JSON, digests: bool = True) -> Answer:
    """The same, read; streams in `res` get their digests back, for those who compare."""
    from abyssal.sandbox.log.records import sha256

    streams = {name: kept_of(kept) for name, kept in value["streams"].items()}
    res = dict(value["res"])
    for name, kept in streams.items():
        total = kept.total if kept.truncated else None
        res[name] = {"sha256": sha256(kept.data), "bytes": len(kept.data), "truncated_from": total}
    return Answer(value["op_id"], value["seq"], value["replayed"], res, streams)


def event_json(event: ProcessEvent) -> tuple[str, dict[str, Any]]:
    """The name and the JSON of an event of a command."""
    if isinstance(event, Exit):
        from abyssal.sandbox.shapes import plain

        return "exit", plain(event)
    name = "stdout" if isinstance(event, Stdout) else "stderr"
    return name, {"base64": base64.b64encode(event.data).decode(), "offset": event.offset}


def event_of(name: str, value: JSON) -> ProcessEvent:
    """The same, read."""
    if name == "exit":
        from abyssal.sandbox.api import Usage

        return Exit(**{**value, "usage": Usage(**value["usage"])})
    kind = Stdout if name == "stdout" else Stderr
    return kind(base64.b64decode(value["base64"]), value["offset"])
