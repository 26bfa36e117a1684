"""Ports inside, reached from this machine: a listener here whose connections are carried there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Self

from abyssal.sandbox.api import Duplex
from abyssal.sandbox.errors import AgentLost, Expired, SandboxError, SandboxLost
from abyssal.sandbox.network.sockets import SocketDuplex
from abyssal.sandbox.network.streams import join
from abyssal.sandbox.wire import STREAM_WINDOW

logger = logging.getLogger("abyssal.sandbox")
HOST = "127.0.0.1"


class Dialled:
    """A connection that says when it is closed; see `Duplex`."""

    def __init__(self, inner: Duplex, left: Callable[[], None]):
        self._inner, self._left, self._closed = inner, left, False
        self.read, self.write, self.finish = inner.read, inner.write, inner.finish

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._left()
        await self._inner.close()


class Forward:
    """A port of this machine that leads to one inside; made by `Sandbox.port`.

    Attributes:
        host, port: where it listens.
    """

    def __init__(self, dial: Callable[[], Awaitable[Duplex]]):
        self._dial = dial
        self.host, self.port = HOST, 0
        self._server: asyncio.Server
        self._carrying: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, dial: Callable[[], Awaitable[Duplex]], local: int = 0) -> Self:
        """Listen.

        Args:
            dial: makes a connection to the port inside.
            local: port of this machine; 0 for one that is free.
        Raises:
            OSError: it is taken.
        """
        forward = cls(dial)
        forward._server = await asyncio.start_server(forward._accepted, HOST, local, limit=STREAM_WINDOW)
        forward.port = forward._server.sockets[0].getsockname()[1]
        return forward

    @property
    def address(self) -> str:
        """As `host:port`."""
        return f"{self.host}:{self.port}"

    @property
    def closed(self) -> bool:
        """Whether it listens no more."""
        return not self._server.is_serving() and not self._carrying

    async def close(self) -> None:
        """Stop listening and end its connections; a second time does nothing."""
        self._server.close()
        carrying = list(self._carrying)
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(SocketDuplex(reader, writer)))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, here: Duplex) -> None:
        there: Duplex | None = None
        try:
            there = await self._dial()
            await join(here, there)
        except (AgentLost, Expired, SandboxLost) as error:
            logger.warning("a port was closed with its sandbox", extra={"port": self.port, "why": str(error)})
            self._server.close()
        except SandboxError as error:
            logger.info("a port inside did not answer", extra={"port": self.port, "why": str(error)})
        except ConnectionError:
            pass
        finally:
            await here.close()
            if there is not None:
                await there.close()
