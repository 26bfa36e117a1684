"""The edge of one node, as an actor: who may call it decides the cluster, what it does is the edge's (sandbox.md 9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.sandbox.admission import Capacity
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.registry import installed
from abyssal.sandbox.http.daemon import edge_home
from abyssal.sandbox.service import Wanted


@dataclass(frozen=True)
class EdgeSettings:
    """What edges are started with; who comes first decides.

    Attributes:
        home: folder on each node, in which each edge has one of its own; default that of the node's local edge.
        capacity: of each node. Patience is short: another node may have room.
        engines: names of those to offer; empty for all.
        allow_unsafe: also the engine `process`, which is no sandbox; for tests.
        open_network: whether sandboxes may ask for the network mode "open".
    """

    home: Path | None = None
    capacity: Capacity = field(default_factory=lambda: Capacity(patience=5.0))
    engines: tuple[str, ...] = ()
    allow_unsafe: bool = False
    open_network: bool = False


class EdgeActor:
    """An edge that starts with its process; all calls wait until it has.

    Args:
        name: the edge's id.
        settings: see there.
    """

    def __init__(self, name: str, settings: EdgeSettings):
        self._name, self._settings = name, settings
        self._opening = asyncio.get_running_loop().create_task(_open(name, settings))

    async def _edge(self) -> Edge:
        """The edge once it is open; where that failed, who comes next tries again."""
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except Exception:
            if opening is self._opening:
                self._opening = asyncio.create_task(_open(self._name, self._settings))
            raise

    async def ask(self, method: str, *arguments: Any) -> Any:
        """A method of `Service`, by its name."""
        return await getattr(await self._edge(), method)(*arguments)

    async def follow(self, method: str, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        """One that gives items as they come."""
        async for item in getattr(await self._edge(), method)(*arguments, **options):
            yield item

    async def offer(self, wanted: Wanted) -> float:
        """How full it is.

        Raises:
            Unsupported: no engine here could run this.
        """
        edge = await self._edge()
        await edge.placement.choose(wanted.spec, wanted.engine)
        return edge.admission.used

    async def created(self, op_id: str) -> bool:
        """Whether a creation of this name was asked for here."""
        return (await self._edge()).knows(op_id)


async def _open(name: str, settings: EdgeSettings) -> Edge:
    home = edge_home(settings.home) / "ray" / name
    engines = installed(home / "engines", allow_unsafe=settings.allow_unsafe, names=settings.engines)
    return await Edge.open(home, engines, capacity=settings.capacity, open_network=settings.open_network, name=name)
