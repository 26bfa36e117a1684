"""The process that holds an edge's boxes: they outlive the edge for as long as it has the descriptors (sandbox.md 9).

It does nothing while an edge is there. When the edge dies, it waits for the next one, ends sandboxes whose time to
live has passed, and after a time of grace ends all and sweeps, so nothing is left that nobody owns. When it dies too,
all descriptors are closed, and every agent ends by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from abyssal.sandbox.keeping import MESSAGE, MOST

TICK_S = 0.25


@dataclass(frozen=True)
class Kept:
    """A box.

    Attributes:
        engine, state: who sweeps what is left of it.
        handles: descriptors by name.
    """

    engine: str
    state: str
    handles: dict[str, int]

    def close(self) -> None:
        """Let go: its agent ends."""
        for handle in self.handles.values():
            os.close(handle)


class Keeper:
    """The process.

    Args:
        listening: where edges come to.
        home: folder of the edge.
        grace: seconds without one.
    """

    def __init__(self, listening: socket.socket, home: Path, grace: float):
        self._listening, self._home, self._grace = listening, home, grace
        self._edges: list[socket.socket] = []
        self._boxes: dict[str, Kept] = {}
        self._engines: set[tuple[str, str]] = set()
        self._bye = False

    def run(self) -> None:
        """Until an edge says so, or none came."""
        alone_since = time.monotonic()
        while not self._bye:
            ready, _, _ = select.select([self._listening, *self._edges], [], [], None if self._edges else TICK_S)
            for one in ready:
                if one is self._listening:
                    self._edges.append(one.accept()[0])
                else:
                    self._hear(one)
            if self._edges:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since >= self._grace:
                break
            else:
                self._end(box_id for box_id in [*self._boxes] if self._deadline(box_id) <= time.time())
        if not self._bye:
            self._end([*self._boxes], last=True)

    def _hear(self, edge: socket.socket) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(edge, MESSAGE, MOST)
        except OSError:
            data, fds = b"", []
        if not data:
            self._edges.remove(edge)
            edge.close()
            return
        said = json.loads(data)
        if said["do"] == "hold":
            self._drop(said["box"])
            self._boxes[said["box"]] = Kept(said["engine"], said["state"], dict(zip(said["names"], fds, strict=True)))
            self._engines.add((said["engine"], said["state"]))
        elif said["do"] == "drop":
            self._drop(said["box"])
        elif said["do"] == "take":
            self._give(edge)
        else:
            self._bye = True

    def _give(self, edge: socket.socket) -> None:
        with suppress(OSError):  # it has died as well
            for box_id, kept in self._boxes.items():
                said = json.dumps({"box": box_id, "names": [*kept.handles]}).encode()
                socket.send_fds(edge, [said], list(kept.handles.values()))
            edge.send(b"{}")

    def _drop(self, box_id: str) -> None:
        if box_id in self._boxes:
            self._boxes.pop(box_id).close()

    def _deadline(self, box_id: str) -> float:
        """As the last edge wrote it down."""
        try:
            return float(json.loads((self._home / "boxes" / box_id / "sandbox.json").read_bytes())["deadline"])
        except (OSError, ValueError, KeyError):
            return float("inf")

    def _end(self, boxes: Iterable[str], *, last: bool = False) -> None:
        """End boxes; at last, also what no edge has given us, such as one that was being made."""
        ended = list(boxes)
        for box_id in ended:
            self._drop(box_id)
        if not ended and not last:
            return
        asyncio.run(_sweep(self._engines, frozenset(self._boxes)))
        for folder in (self._home / "live").iterdir():
            if folder.name not in self._boxes:
                shutil.rmtree(folder, ignore_errors=True)


async def _sweep(engines: Iterable[tuple[str, str]], alive: frozenset[str]) -> None:
    from abyssal.sandbox.engines.registry import installed

    for name, state in engines:
        for engine in installed(Path(state), names=[name]):
            await engine.sweep(alive)


def main() -> None:
    """The process; its arguments are the folder and the seconds of grace, its input is where it listens."""
    os.chdir("/")
    Keeper(socket.socket(fileno=0), Path(sys.argv[1]), float(sys.argv[2])).run()
