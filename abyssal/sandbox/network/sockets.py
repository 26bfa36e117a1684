"""Connections of this host as a `Duplex`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from abyssal.sandbox.wire import STREAM_WINDOW


class SocketDuplex:
    """A connection of asyncio's; see `Duplex`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, address: str, port: int) -> Self:
        """Connect to an address; nothing is resolved.

        Raises:
            OSError: nobody answers.
        """
        return cls(*await asyncio.open_connection(address, port, limit=STREAM_WINDOW))

    async def read(self) -> bytes:
        try:
            return await self._reader.read(STREAM_WINDOW)
        except OSError as error:
            raise ConnectionResetError(str(error)) from None

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ConnectionResetError(str(error)) from None

    async def finish(self) -> None:
        with suppress(OSError):
            if self._writer.can_write_eof() and not self._writer.is_closing():
                self._writer.write_eof()

    async def close(self) -> None:
        self._writer.transport.abort()
