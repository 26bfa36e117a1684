"""What an edge keeps of a sandbox on its disk, so that the next edge of this host can go on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from abyssal.base.files import write_json
from abyssal.sandbox import shapes
from abyssal.sandbox.api import Placed, Spec
from abyssal.sandbox.errors import LogError

FILE = "sandbox.json"
Status = Literal["creating", "running", "paused", "lost", "gone", "expired"]


@dataclass(frozen=True)
class Sheet:
    """The file of a sandbox.

    Attributes:
        id: of the sandbox.
        spec: as asked for.
        engine: that runs it.
        status: "lost" and the two behind it live in their log alone.
        created, deadline: wall clock, seconds.
        placed: what it is; None while it is being created.
        op_id: the caller's name for its creation.
        actor: who created it.
        parent: {sandbox, seq, hash} of a fork or restore.
        snapshots: ids, in order, and the place in the log behind which each was taken.
        head: hash of the last record, once the log is closed for good.
        why: it is lost.
        digest: of what was asked for, to know a creation that is asked for again.
    """

    id: str
    spec: Spec
    engine: str
    status: Status
    created: float
    deadline: float
    placed: Placed | None = None
    op_id: str | None = None
    actor: str = "local"
    parent: dict[str, Any] | None = None
    snapshots: dict[str, int] = field(default_factory=dict)
    head: str | None = None
    why: str = ""
    digest: str = ""

    @property
    def alive(self) -> bool:
        """Whether a box should be there."""
        return self.status in ("running", "paused")

    def write(self, folder: Path) -> None:
        """Keep it."""
        write_json(folder / FILE, shapes.plain(self))

    def changed(self, **fields: Any) -> Sheet:
        """Another with some fields changed."""
        return replace(self, **fields)

    def info(self) -> dict[str, Any]:
        """What callers see."""
        shown = shapes.plain(self)
        shown["created"], shown["deadline"] = rfc3339(self.created), rfc3339(self.deadline)
        return shown


def read(folder: Path) -> Sheet:
    """The sheet in a sandbox's folder.

    Raises:
        LogError: it cannot be read.
    """
    try:
        value = json.loads((folder / FILE).read_bytes())
        placed = None if value["placed"] is None else shapes.placed(value["placed"])
        return Sheet(**{**value, "spec": shapes.spec(value["spec"]), "placed": placed})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LogError(f"{folder / FILE} cannot be read ({error}): its sandbox is not known any more") from None


def rfc3339(seconds: float) -> str:
    """A wall clock's seconds, in UTC."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
