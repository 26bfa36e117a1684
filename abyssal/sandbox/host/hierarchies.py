"""Where control groups can be made, versions 1 and 2 (sandbox.md 3, rule 4).

Nothing is assumed: `/proc/self/cgroup` says in which group we are, `/proc/self/mountinfo` where its file system is.
Groups are made below our own alone. A host may have version 1 with one controller a mount, version 2, or both; each
controller is used where it is enabled, version 2 first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

PARENT = "abyssal"  # all our groups lie in groups of this name
Controller = Literal["memory", "pids", "cpu", "cpuset", "cpuacct", "freezer"]
CONTROLLERS: tuple[Controller, ...] = ("memory", "pids", "cpu", "cpuset", "cpuacct", "freezer")


@dataclass(frozen=True)
class Hierarchies:
    """Where groups can be made: our own group's folder for each controller, and of version 2 if it is mounted.

    Attributes:
        v1: folder by controller.
        v2: folder, or None.
        v2_controllers: that it can hand on.
    """

    v1: Mapping[Controller, Path]
    v2: Path | None
    v2_controllers: frozenset[str]

    @classmethod
    def find(cls, proc: Path = Path("/proc/self")) -> Hierarchies:
        """Read the two files of `/proc`."""
        own: dict[str, str] = {}
        for line in (proc / "cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            own.update(dict.fromkeys(names.split(","), path))
        v1: dict[Controller, Path] = {}
        v2: Path | None = None
        for point, root, controllers in _mounted(proc):
            if controllers is None and "" in own:
                v2 = _place(point, root, own[""])
            for name in CONTROLLERS:
                if name in (controllers or ()) and name in own and name not in v1:
                    place = _place(point, root, own[name])
                    if place is not None:
                        v1[name] = place
        return cls(v1, v2, _handed_on(v2) if v2 else frozenset())

    @classmethod
    def holding(cls, group: str, proc: Path = Path("/proc/self")) -> Hierarchies:
        """Those in which a group of this name was made, below whatever group its maker was in."""
        v1: dict[Controller, Path] = {}
        v2: Path | None = None
        for point, _, controllers in _mounted(proc):
            for folder, folders, _ in os.walk(point):  # other groups come and go meanwhile, where glob would raise
                place = Path(folder, PARENT, group)
                if PARENT not in folders or not place.is_dir():
                    continue
                if controllers is None:
                    v2 = place.parents[1]
                else:
                    v1.update({name: place.parents[1] for name in CONTROLLERS if name in controllers})
        return cls(v1, v2, frozenset(words(v2 / "cgroup.subtree_control")) if v2 else frozenset())

    def folder(self, controller: Controller) -> Path | None:
        """Our own group's folder for a controller; version 2 counts processor time and freezes without any."""
        if self.v2 is not None and (controller in self.v2_controllers or controller in ("freezer", "cpuacct")):
            return self.v2
        return self.v1.get(controller)

    def missing(self) -> tuple[str, ...]:
        """Limits that the kernel cannot enforce here, in words."""
        soft: dict[Controller, str] = {"memory": "memory-soft", "pids": "pids-soft", "cpu": "cpu-soft"}
        return tuple(word for name, word in soft.items() if not _writable(self.folder(name)))


def _mounted(proc: Path) -> Iterator[tuple[str, str, Sequence[str] | None]]:
    """Mount point and root of each file system of groups, and its controllers; None for version 2."""
    for line in (proc / "mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind in ("cgroup", "cgroup2"):
            yield point, root, options.split(",") if kind == "cgroup" else None


def _writable(folder: Path | None) -> bool:
    return folder is not None and os.access(folder, os.W_OK)


def _place(point: str, root: str, own: str) -> Path | None:
    try:
        below = PurePosixPath(own).relative_to(root)
    except ValueError:  # another part of the tree is mounted
        return None
    folder = Path(point) / below
    return folder if folder.is_dir() else None


def _handed_on(folder: Path) -> frozenset[str]:
    """Controllers that children of a version 2 group get, after asking for them."""
    wanted = {"memory", "pids", "cpu", "cpuset"} & set(words(folder / "cgroup.controllers"))
    for name in wanted - set(words(folder / "cgroup.subtree_control")):
        with suppress(OSError):  # it holds processes itself, or we may not
            (folder / "cgroup.subtree_control").write_text(f"+{name}")
    return frozenset(wanted & set(words(folder / "cgroup.subtree_control")))


def words(path: Path) -> list[str]:
    """Of a file; none where it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []
