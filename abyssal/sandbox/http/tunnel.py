"""Ports inside over WebSocket: binary messages are bytes, texts are JSON control, one connection each (sandbox.md 5).

The server says `{"open": true}` once somebody inside has accepted; `{"end": true}`, from either side, says that nothing
more follows from there.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Self

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from abyssal.sandbox import shapes
from abyssal.sandbox.errors import SandboxError, Timeout
from abyssal.sandbox.http import routes
from abyssal.sandbox.http.gate import Gate
from abyssal.sandbox.http.terminal import FAILED, REFUSED
from abyssal.sandbox.network.streams import join

_OPEN, _END = json.dumps({"open": True}), json.dumps({"end": True})
_MOST = 1 << 20  # bytes of one message


async def tunnel(gate: Gate, socket: WebSocket) -> None:
    """One connection to a port inside."""
    await socket.accept()
    side = _Served(socket)
    try:
        caller = gate.caller(socket.headers)
        await gate.allowed(caller, socket.path_params["sandbox"])
        there = await gate.edge.dial(socket.path_params["sandbox"], socket.path_params["port"], caller.actor)
        try:
            await socket.send_text(_OPEN)
            await join(side, there)
        finally:
            await there.close()
        await side.close()
    except SandboxError as error:
        await socket.send_text(json.dumps(routes.error_body(error)))
        await socket.close(REFUSED if type(error).__name__ == "Unauthorised" else FAILED)
    except ConnectionError:
        await side.close()


class _Served:
    """The server's end; see `Duplex`."""

    def __init__(self, socket: WebSocket):
        self._socket = socket

    async def read(self) -> bytes:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise ConnectionResetError("the client has left")
            if message.get("bytes"):
                return bytes(message["bytes"])
            if message.get("text") == _END:
                return b""

    async def write(self, data: bytes) -> None:
        try:
            await self._socket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionResetError("the client has left") from error

    async def finish(self) -> None:
        try:
            await self._socket.send_text(_END)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionResetError("the client has left") from error

    async def close(self) -> None:
        if WebSocketState.DISCONNECTED not in (self._socket.client_state, self._socket.application_state):
            await self._socket.close()


class Tunnel:
    """The client's end; see `Duplex`."""

    def __init__(self, connection: ClientConnection):
        self._connection = connection

    @classmethod
    async def open(cls, url: str, path: str, token: str | None, socket: Path | None) -> Self:
        """Connect to a port inside.

        Args:
            url: of the server, http or https.
            path: below it.
            token: of the project.
            socket: of a unix socket to go through.
        Raises:
            SandboxError: as the server says, or nobody answers.
        """
        address = f"ws{url.removeprefix('http').rstrip('/')}{path}"
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        # no pings: a program that reads slowly keeps them waiting behind its bytes
        options: dict[str, Any] = {"max_size": _MOST, "compression": None, "ping_interval": None}
        try:
            if socket is not None:
                connection = await unix_connect(str(socket), address, additional_headers=headers, **options)
            else:
                connection = await connect(address, additional_headers=headers, proxy=None, **options)
        except (OSError, TimeoutError, InvalidStatus, WebSocketException) as error:
            raise Timeout(f"nobody answers at {url} ({error}): is the edge running?") from None
        try:
            first = json.loads(await connection.recv())
        except (ConnectionClosed, ValueError) as error:
            await connection.close()
            raise Timeout(f"the server at {url} ended the connection ({error})") from None
        if "error" in first:
            await connection.close()
            raise shapes.error_of(first["error"])
        return cls(connection)

    async def read(self) -> bytes:
        try:
            while True:
                message = await self._connection.recv()
                if isinstance(message, bytes) and message:
                    return message
                if message == _END:
                    return b""
        except ConnectionClosed as error:
            raise ConnectionResetError(f"the connection inside has ended: {error}") from None

    async def write(self, data: bytes) -> None:
        try:
            await self._connection.send(data)
        except ConnectionClosed as error:
            raise ConnectionResetError(f"the connection inside has ended: {error}") from None

    async def finish(self) -> None:
        try:
            await self._connection.send(_END)
        except ConnectionClosed as error:
            raise ConnectionResetError(f"the connection inside has ended: {error}") from None

    async def close(self) -> None:
        await asyncio.shield(self._connection.close())
