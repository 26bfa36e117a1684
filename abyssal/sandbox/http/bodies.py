"""Bodies of requests: read within bounds, and checked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from abyssal.sandbox import shapes
from abyssal.sandbox.errors import BadRequest, LimitHit
from abyssal.sandbox.http import routes

BODY = 256 << 20
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "path": lambda value: isinstance(value, str),
    "to": lambda value: isinstance(value, str),
    "memory": lambda value: isinstance(value, bool),
    "count": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "signal": lambda value: isinstance(value, int) and 0 < value < 65,
    "rows": lambda value: isinstance(value, int) and 0 < value < 65536,
    "columns": lambda value: isinstance(value, int) and 0 < value < 65536,
    "offset": lambda value: value >= 0,
    "length": lambda value: value >= 0,
    "mode": lambda value: 0 <= value <= 0o7777,
}
_NEEDED = {"file.move": ("path", "to"), "signal": ("signal",), "resize": ("rows", "columns"), "ttl": ("ttl",),
           "network": ("network",)}  # fmt: skip


def check(req: Mapping[str, Any]) -> None:
    """Insist on what an operation needs.

    Raises:
        BadRequest: a field is missing or wrong.
    """
    needed = _NEEDED.get(req["op"], ("path",) if req["op"].startswith("file.") else ())
    for name in needed:
        if name not in req:
            raise BadRequest(f"{req['op']} needs {name}")
    for name, value in req.items():
        if name in _CHECKS and not _CHECKS[name](value):
            raise BadRequest(f"{name} {value!r} is no {name} of {req['op']}")


def exec_request(value: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None, str]:
    """A command out of a body: the operation, its input, and whether the caller waits.

    Raises:
        BadRequest: a field is wrong.
    """
    known = {*routes.EXEC_FIELDS, "shell", "stdin", "stdin_base64", "stdin_open", "mode"}
    if set(value) - known:
        raise BadRequest(
            f"exec does not know {', '.join(sorted(set(value) - known))}: it has {', '.join(sorted(known))}"
        )
    req: dict[str, Any] = {"op": "exec"}
    if isinstance(value.get("shell"), str) and "argv" not in value:
        req["argv"] = ["/bin/sh", "-c", value["shell"]]
    elif isinstance(value.get("argv"), list) and value["argv"] and all(isinstance(arg, str) for arg in value["argv"]):
        req["argv"] = value["argv"]
    else:
        raise BadRequest("exec needs argv, a list of texts, or shell, a text")
    for name in ("cwd", "user"):
        if value.get(name) is not None:
            if not isinstance(value[name], str):
                raise BadRequest(f"{name} {value[name]!r} is no text")
            req[name] = value[name]
    if value.get("env"):
        req["env"] = dict(shapes.texts(value["env"], "env"))
    if value.get("timeout") is not None:
        req["timeout"] = shapes.seconds(value["timeout"], "timeout")
    tty = value.get("tty")
    if tty is not None:
        if not (isinstance(tty, list) and len(tty) == 2 and all(isinstance(n, int) and 0 < n < 65536 for n in tty)):
            raise BadRequest(f"tty {tty!r} is not [rows, columns]")
        req["tty"] = tty
    for name, shown in (("keep", "keep"), ("stdin_open", "stdin")):
        if value.get(name):
            req[shown] = True
    data = None
    if value.get("stdin") is not None:
        data = str(value["stdin"]).encode()
    elif value.get("stdin_base64") is not None:
        try:
            data = base64.b64decode(value["stdin_base64"], validate=True)
        except (ValueError, TypeError):
            raise BadRequest("stdin_base64 is no base 64") from None
    mode = value.get("mode", "wait")
    if mode not in ("wait", "stream", "detach"):
        raise BadRequest(f"mode {mode!r} is unknown: choose wait, stream or detach")
    return req, data, mode


async def body(request: Request) -> bytes:
    """The body, within bounds.

    Raises:
        LimitHit: it is too long.
    """
    pieces, total = [], 0
    async for piece in request.stream():
        total += len(piece)
        if total > BODY:
            raise LimitHit("output", f"a body of more than {BODY} bytes is not taken: send it in parts")
        pieces.append(piece)
    return b"".join(pieces)


async def body_json(request: Request) -> Mapping[str, Any]:
    """The body as a JSON object; an empty one is an empty object.

    Raises:
        BadRequest: it is none.
    """
    data = await body(request)
    try:
        value = json.loads(data) if data else {}
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("the body is no JSON object")
    return value
