"""The proxy that sandboxes' connections go through: HTTP CONNECT, and plain HTTP with whole addresses (sandbox.md 7).

It resolves names itself, judges what they resolved to, and connects to that very address: a name server that changes
its mind between judging and connecting changes nothing. One request of plain HTTP is carried for each connection, so
nothing can follow it to the same server under another name. Credentials are not added.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import urlsplit

import h11

from abyssal.sandbox.api import Denied, Duplex, Network, Resolver
from abyssal.sandbox.network.policy import is_address, refused_address, refused_target, tidy
from abyssal.sandbox.network.sockets import SocketDuplex
from abyssal.sandbox.network.streams import join

HEAD_S = 30.0  # for a request to be there
CONNECT_S = 15.0
_HOPS = (b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"host")


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """Addresses of a name, as this host's resolver gives them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Refused(Exception):  # noqa: N818
    """An answer instead of a connection."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Proxy:
    """One connection of a sandbox.

    Args:
        inside: the connection.
        network: what is allowed.
        resolve: names to addresses.
        denied: told of each refusal; may make the sandbox wait.
    """

    def __init__(
        self, inside: Duplex, network: Network, resolve: Resolver, denied: Callable[[Denied], Awaitable[None]]
    ):
        self._inside, self._network, self._resolve, self._denied = inside, network, resolve, denied
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=32 << 10)

    async def run(self) -> None:
        """Carry it to its end.

        Raises:
            ConnectionError: it broke inside.
        """
        try:
            async with asyncio.timeout(HEAD_S):
                request = await self._event()
            if not isinstance(request, h11.Request):
                return
            if request.method == b"CONNECT":
                await self._tunnel(request)
            else:
                await self._forward(request)
        except _Refused as refused:
            await self._answer(refused.status, str(refused))
        except h11.ProtocolError as error:
            await self._answer(error.error_status_hint, f"this is no request to a proxy: {error}")
        except TimeoutError:
            await self._answer(408, f"no request came within {HEAD_S:g} s")

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            self._http.receive_data(await self._inside.read())

    async def _tunnel(self, request: h11.Request) -> None:
        host, colon, port = request.target.decode("ascii", "replace").rpartition(":")
        outside = await self._reach(host if colon else "", port)
        try:
            await self._event()  # the end of the request
            answer = self._http.send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
            await self._inside.write(answer or b"")
            early, _ = self._http.trailing_data
            if early:
                await outside.write(early)
            await join(self._inside, outside)
        finally:
            await outside.close()

    async def _forward(self, request: h11.Request) -> None:
        url = request.target.decode("ascii", "replace")
        try:
            parts = urlsplit(url)
            port = str(80 if parts.port is None else parts.port)
        except ValueError:
            raise _Refused(400, f"{url[:200]!r} is no address") from None
        if parts.scheme != "http" or parts.hostname is None:
            raise _Refused(400, "a proxy takes CONNECT, or the whole address of something under http://")
        if parts.username is not None:
            raise _Refused(400, "an address here has no user name")
        outside = await self._reach(parts.hostname, port)
        try:
            await self._exchange(request, url, parts.netloc, outside)
        finally:
            await outside.close()

    async def _exchange(self, request: h11.Request, url: str, authority: str, outside: Duplex) -> None:
        """One request as the server expects it; its answer as it comes, to the end of the connection."""
        headers = [(b"Host", authority.encode()), (b"Connection", b"close")]
        for name, value in request.headers.raw_items():
            if name.lower() not in _HOPS and not name.lower().startswith(b"proxy-"):
                headers.append((name, value))
        path = url.split("://", 1)[1].partition("#")[0].removeprefix(authority)
        path = path if path.startswith("/") else f"/{path}"
        ours = h11.Connection(h11.CLIENT)
        head = h11.Request(method=request.method, target=path, headers=headers)
        await outside.write(ours.send(head) or b"")
        answer = asyncio.create_task(_answer_of(outside, self._inside))
        body = asyncio.create_task(self._body(ours, outside))
        try:
            await asyncio.wait([answer, body], return_when=asyncio.FIRST_COMPLETED)
            if body.done():
                body.result()
            await answer
        finally:
            for task in (answer, body):
                task.cancel()
            await asyncio.gather(answer, body, return_exceptions=True)

    async def _body(self, ours: h11.Connection, outside: Duplex) -> None:
        while True:
            event = await self._event()
            if isinstance(event, h11.Data | h11.EndOfMessage):
                await outside.write(ours.send(event) or b"")
            if not isinstance(event, h11.Data):
                return

    async def _reach(self, host: str, port_text: str) -> Duplex:
        """A connection to an address that was judged, and no other."""
        name = tidy(host)
        port = int(port_text) if port_text.isascii() and port_text.isdigit() and len(port_text) < 6 else 0
        if not name or not 0 < port < 65536:
            raise _Refused(400, f"{host[:200]!r} and {port_text[:20]!r} are no host and port")
        if why := refused_target(self._network, name, port):
            await self._deny(name, port, "", why)
        try:
            async with asyncio.timeout(CONNECT_S):
                found = [name] if is_address(name) else await self._resolve(name, port)
        except (OSError, UnicodeError, TimeoutError) as error:
            raise _Refused(502, f"{name} cannot be resolved: {error or 'no answer'}") from None
        reasons = {address: refused_address(self._network, address, port) for address in found}
        good = [address for address, why in reasons.items() if not why]
        if not good:
            address, why = next(iter(reasons.items()), ("", "the name has no address"))
            await self._deny(name, port, address, why)
        failure: Exception | None = None
        for address in good:
            try:
                async with asyncio.timeout(CONNECT_S):
                    return await SocketDuplex.connect(address, port)
            except (OSError, TimeoutError) as error:
                failure = error
        raise _Refused(502, f"{name} port {port} cannot be reached: {failure or 'no answer'}")

    async def _deny(self, host: str, port: int, address: str, why: str) -> None:
        await self._denied(Denied(host, port, address, why))
        shown = f" ({address})" if address and address != host else ""
        raise _Refused(403, f"{host}{shown} port {port} is denied by the network policy: {why}")

    async def _answer(self, status: int, reason: str) -> None:
        text = f"{reason}\n".encode()
        head = (
            f"HTTP/1.1 {HTTPStatus(status).value} {HTTPStatus(status).phrase}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(text)}",
            "Connection: close",
        )
        await self._inside.write("\r\n".join((*head, "\r\n")).encode() + text)
        await self._inside.finish()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):  # else what it still sends would break the connection before it has read
                while await self._inside.read():
                    pass


async def _answer_of(outside: Duplex, inside: Duplex) -> None:
    while data := await outside.read():
        await inside.write(data)
    await inside.finish()
