"""What a guest does before it is kept as a template, so that those who go on from there find it in memory.

A processor that is emulated takes longest for what it does for the first time: it reads a program from a disk by way of
drivers that are translated as they run. The rehearsal says nothing that is anybody's: every sandbox greets its guest
anew.
"""

from __future__ import annotations

import asyncio

from abyssal.sandbox import wire
from abyssal.sandbox.agent import Hello
from abyssal.sandbox.wire import Frame, Kind

FIRST = (("true",), ("/bin/sh", "-c", "exit"))  # how most sandboxes begin; where an image lacks one, nothing happens
_WINDOW, _MOST_MS = 4096, 20_000
_REST_S = 0.2  # in which the guest's kernel frees what these programs had


async def rehearse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greet the guest and run some programs in it.

    Raises:
        asyncio.IncompleteReadError: it ended.
    """
    writer.write(wire.encode(Kind.HELLO, 1, Hello("template").payload()))
    await _until(reader, 1, Kind.READY)
    for number, argv in enumerate(FIRST, 2):
        items: list[tuple[str, object]] = [("arg", word) for word in argv]
        items += [("window", _WINDOW), ("timeout_ms", _MOST_MS)]  # they are the image's programs, not ours
        writer.write(wire.encode(Kind.EXEC, number, wire.fields(items)))
        await _until(reader, number, Kind.EXITED)
    writer.write(wire.encode(Kind.SYNC, 1))
    await _until(reader, 1, Kind.OK)
    await asyncio.sleep(_REST_S)


async def heard(reader: asyncio.StreamReader) -> Frame:
    """The next frame, without its payload.

    Raises:
        asyncio.IncompleteReadError: the guest ended.
    """
    body = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))
    return Frame(body[0], int.from_bytes(body[1:5], "little"))


async def _until(reader: asyncio.StreamReader, op: int, kind: Kind) -> None:
    while True:
        frame = await heard(reader)
        if frame.op == op and frame.kind in (kind, Kind.FAIL):
            return
