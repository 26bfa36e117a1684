"""Terminals over WebSocket: binary frames are bytes, texts are JSON control (sandbox.md 5)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from abyssal.sandbox.api import Exit
from abyssal.sandbox.errors import BadRequest, SandboxError
from abyssal.sandbox.http import routes
from abyssal.sandbox.http.access import Caller
from abyssal.sandbox.http.gate import Gate
from abyssal.sandbox.operation import Asked

REFUSED, FAILED = 4401, 4400


async def terminal(gate: Gate, socket: WebSocket) -> None:
    """Open a terminal, or come back to one that is open: `?op=` its operation, `?from=` the byte to go on at."""
    sandbox = socket.path_params["sandbox"]
    query = socket.query_params
    await socket.accept()
    try:
        caller = gate.caller(socket.headers)
        await gate.allowed(caller, sandbox)
        op_id = query.get("op")
        if op_id is None:
            size = [int(query.get("rows", "24")), int(query.get("columns", "80"))]
            req: dict[str, Any] = {"op": "exec", "argv": [query.get("command", "/bin/sh")], "tty": size}
            begun = await gate.edge.begin(sandbox, req, routes.asked_of(socket.headers, caller.actor))
            op_id = begun.op_id
        await socket.send_text(json.dumps({"op_id": op_id}))
        sender = asyncio.create_task(_send(gate, socket, sandbox, op_id, int(query.get("from", "0"))))
        receiver = asyncio.create_task(_receive(gate, socket, sandbox, op_id, caller))
        done, left = await asyncio.wait([sender, receiver], return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in done:
            task.result()
        if sender in done:
            await socket.close()
    except WebSocketDisconnect:
        return  # the terminal goes on without us
    except (SandboxError, ValueError) as error:
        told = error if isinstance(error, SandboxError) else BadRequest(f"a number is expected: {error}")
        await socket.send_text(json.dumps(routes.error_body(told)))
        await socket.close(REFUSED if type(error).__name__ == "Unauthorised" else FAILED)


async def _send(gate: Gate, socket: WebSocket, sandbox: str, op_id: str, offset: int) -> None:
    async for event in gate.edge.events(sandbox, op_id, offset):
        if isinstance(event, Exit):
            await socket.send_text(json.dumps({"exit": routes.event_json(event)[1]}))
        else:
            await socket.send_bytes(event.data)


async def _receive(gate: Gate, socket: WebSocket, sandbox: str, op_id: str, caller: Caller) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        if message.get("bytes") is not None:
            await gate.edge.type(sandbox, op_id, message["bytes"], caller.actor)
            continue
        control = json.loads(message["text"])
        asked = Asked(actor=caller.actor)
        if not isinstance(control, dict):
            raise BadRequest("control is a JSON object")
        if "resize" in control:
            rows, columns = control["resize"]
            await gate.edge.call(sandbox, {"op": "resize", "of": op_id, "rows": rows, "columns": columns}, asked)
        elif "signal" in control:
            await gate.edge.call(sandbox, {"op": "signal", "of": op_id, "signal": control["signal"]}, asked)
        else:
            raise BadRequest('control is {"resize": [rows, columns]} or {"signal": number}')
