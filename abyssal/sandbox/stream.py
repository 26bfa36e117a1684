"""The byte stream to a guest: a socket, or two pipes where the guest may end and go on behind them.

gVisor shuts down the socket that it was given when it ends, also to go on from a checkpoint. A pipe breaks only when
nobody holds its other end any more, and who has one end can open the other anew.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from contextlib import suppress
from typing import NamedTuple

ROOM = 1 << 18  # bytes that a pipe holds


class Ends(NamedTuple):
    """Descriptors to read from and to write to; the same one of a socket."""

    source: int
    sink: int

    def close(self) -> None:
        """Let go of both."""
        for descriptor in set(self):
            os.close(descriptor)


def sockets() -> tuple[Ends, Ends]:
    """Both ends of a stream over sockets."""
    ours, theirs = (end.detach() for end in socket.socketpair())
    return Ends(ours, ours), Ends(theirs, theirs)


def pipes() -> tuple[Ends, Ends]:
    """Both ends of a stream over two pipes."""
    (our_source, their_sink), (their_source, our_sink) = os.pipe(), os.pipe()
    for sink in (their_sink, our_sink):
        with suppress(OSError):  # more than this user may have
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, ROOM)
    return Ends(our_source, our_sink), Ends(their_source, their_sink)


def others(ours: Ends) -> Ends:
    """The other ends of our two pipes, opened anew."""
    source = os.open(f"/proc/self/fd/{ours.sink}", os.O_RDONLY)
    try:
        return Ends(source, os.open(f"/proc/self/fd/{ours.source}", os.O_WRONLY))
    except BaseException:
        os.close(source)
        raise


async def opened(ends: Ends) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream over ends that are ours; they are closed with it."""
    if ends.source == ends.sink:
        return await asyncio.open_connection(sock=socket.socket(fileno=ends.source))
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    source, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ends.source, "rb", 0)
    )
    sink, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), os.fdopen(ends.sink, "wb", 0)
    )
    return reader, _PipesWriter(source, sink, protocol, ends)


def ends_of(writer: asyncio.StreamWriter) -> Ends:
    """The descriptors of a stream."""
    if isinstance(writer, _PipesWriter):
        return writer.ends
    descriptor = int(writer.get_extra_info("socket").fileno())
    return Ends(descriptor, descriptor)


class _PipesWriter(asyncio.StreamWriter):
    """Closes both pipes, as that of a socket closes both ways."""

    def __init__(
        self,
        source: asyncio.ReadTransport,
        sink: asyncio.WriteTransport,
        protocol: asyncio.StreamReaderProtocol,
        ends: Ends,
    ):
        super().__init__(sink, protocol, None, asyncio.get_running_loop())
        self._source = source
        self.ends = ends

    def close(self) -> None:
        self._source.close()
        super().close()
