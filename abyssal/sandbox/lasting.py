"""What outlives an edge: boxes that somebody holds, and the commands in them (sandbox.md 9).

A box lives as long as the descriptors that lead to it are open somewhere. A keeper holds them beside the edge
(`keeping`), and the next edge has the engine make a box of them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from abyssal.sandbox.api import Box, Process, Spec


@runtime_checkable
class Settles(Protocol):
    """A process that is remembered inside until somebody has its end."""

    async def settle(self) -> None:
        """Its result is kept: nobody will ask for it again."""


class Left(Protocol):
    """A command that an earlier edge began.

    Attributes:
        stdout, stderr: bytes before those that can still be read.
        fed: whether it has all of its input.
    """

    @property
    def stdout(self) -> int: ...

    @property
    def stderr(self) -> int: ...

    @property
    def fed(self) -> bool: ...

    async def join(self, stdout: int, stderr: int) -> Process:
        """Go on with it, from these bytes of its output on or from the first that can still be read."""

    async def settle(self) -> None:
        """Nobody will."""


@runtime_checkable
class Lasting(Protocol):
    """A box that lives as long as somebody holds what leads to it."""

    def handles(self) -> Mapping[str, int]:
        """Descriptors to hold, by names that its engine knows again."""

    async def left(self) -> Mapping[str, Left]:
        """Commands of an earlier edge, by name; of a box that is paused, once it goes on."""


@runtime_checkable
class Adopts(Protocol):
    """An engine whose sandboxes outlive the process that began them.

    Attributes:
        lasting: whether they are to; said before the first is made.
        state: folder of what it builds, by which a sweep knows its boxes; None where nothing has to be swept.
    """

    lasting: bool
    state: Path | None

    async def adopt(self, box_id: str, spec: Spec, folder: Path, handles: Mapping[str, int], *, paused: bool) -> Box:
        """Take over a living sandbox that an earlier process of this host created with the same arguments.

        Args:
            box_id, spec, folder: as they were for `create`; the network is the one that holds now.
            handles: of the box, the caller's to close; empty where nobody held any.
            paused: whether it is to stand still, whatever was under way.
        Raises:
            AgentLost: it lives no more.
        """
