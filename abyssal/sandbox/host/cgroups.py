"""One control group for a sandbox, in every hierarchy that has a part in its limits (sandbox.md 3, rule 4)."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from abyssal.sandbox.api import Limits, Usage
from abyssal.sandbox.errors import Rejected, Unsupported
from abyssal.sandbox.host.hierarchies import CONTROLLERS, PARENT, Controller, Hierarchies, words

PERIOD_US = 100_000


class Group:
    """A group with limits, in every hierarchy that has a part in them.

    Attributes:
        name: of the group, below our own.
    """

    def __init__(self, name: str, hierarchies: Hierarchies):
        self.name = name
        self._all = hierarchies

    @classmethod
    def create(cls, name: str, limits: Limits, hierarchies: Hierarchies | None = None) -> Group:
        """Make it and set the limits that this host can enforce.

        Raises:
            Unsupported: not a single controller can be used.
            Rejected: the kernel refused a limit.
        """
        group = cls(name, hierarchies or Hierarchies.find())
        folders = group.folders()
        if not folders:
            raise Unsupported("no control group can be made below our own: run as root, or have one delegated")
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                _hand_down(folder)
            group._limit(limits)
        except OSError as error:
            group.remove()
            raise Rejected(f"the kernel refused the control group {name}: {error}") from error
        return group

    @classmethod
    def left(cls, name: str) -> Group:
        """One that a platform made which is dead now, whatever group that was in itself."""
        return cls(name, Hierarchies.holding(name))

    @property
    def path(self) -> str:
        """Relative to our own group, the same in every hierarchy; runtimes want it."""
        return f"{PARENT}/{self.name}"

    def folder(self, controller: Controller) -> Path | None:
        """Where it is for a controller."""
        own = self._all.folder(controller)
        return own / PARENT / self.name if own is not None and os.access(own, os.W_OK) else None

    def folders(self) -> list[Path]:
        """All of its folders, each once."""
        found = (self.folder(name) for name in CONTROLLERS)
        return sorted({folder for folder in found if folder is not None})

    def _limit(self, limits: Limits) -> None:
        memory, pids, cpu = self.folder("memory"), self.folder("pids"), self.folder("cpu")
        quota = max(1000, round(limits.cpu * PERIOD_US))
        if memory and self._is_v2(memory):
            (memory / "memory.max").write_text(str(limits.memory))
            _try(memory / "memory.swap.max", "0")
            _try(memory / "memory.oom.group", "0")
        elif memory:
            (memory / "memory.limit_in_bytes").write_text(str(limits.memory))
            _try(memory / "memory.memsw.limit_in_bytes", str(limits.memory))
        if pids:
            (pids / "pids.max").write_text(str(limits.pids))
        if cpu and self._is_v2(cpu):
            (cpu / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        elif cpu:
            (cpu / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (cpu / "cpu.cfs_quota_us").write_text(str(quota))
        self._pin(max(1, math.ceil(limits.cpu)))

    def _pin(self, count: int) -> None:
        """As many cores as the limit has, so that programs count these and no more."""
        folder = self.folder("cpuset")
        if folder is None:
            return
        above = folder.parents[1]
        has = _cores(_first(above / "cpuset.cpus.effective", above / "cpuset.cpus"))
        ours = [core for core in has if core in os.sched_getaffinity(0)] or has
        first = sum(self.name.encode()) % len(ours)
        chosen = sorted((ours + ours)[first : first + min(count, len(ours))])
        for level in (folder.parent, folder):
            cores = has if level != folder else chosen
            _try(level / "cpuset.mems", _first(above / "cpuset.mems.effective", above / "cpuset.mems"))
            (level / "cpuset.cpus").write_text(",".join(map(str, cores)))

    def cores(self) -> int | None:
        """How many cores its processes see; None where that is not limited."""
        folder = self.folder("cpuset")
        return len(_cores(_first(folder / "cpuset.cpus"))) if folder else None

    def _is_v2(self, folder: Path) -> bool:
        return self._all.v2 is not None and folder.is_relative_to(self._all.v2)

    def add(self, pid: int) -> None:
        """Put a process into it; what it starts is then in it too."""
        for folder in self.folders():
            if str(pid) not in words(folder / "cgroup.procs"):  # to move a process makes all others wait
                (folder / "cgroup.procs").write_text(str(pid))

    def pids(self) -> list[int]:
        """Its processes, as numbered here."""
        found = {int(word) for folder in self.folders() for word in words(folder / "cgroup.procs")}
        return sorted(found - {0, os.getpid()})  # 0 stands for processes that have no number here; kill would mean us

    def freeze(self, timeout: float = 10.0) -> None:
        """Stop all of its processes where they are.

        Raises:
            Unsupported: no freezer here.
            Rejected: it did not come to rest in time.
        """
        folder = self.folder("freezer")
        if folder is None:
            raise Unsupported("this host has no freezer of control groups")
        end = time.monotonic() + timeout
        while True:
            if self._is_v2(folder):
                (folder / "cgroup.freeze").write_text("1")
                done = "frozen 1" in (folder / "cgroup.events").read_text()
            else:
                (folder / "freezer.state").write_text("FROZEN")
                done = words(folder / "freezer.state") == ["FROZEN"]
            if done:
                return
            if time.monotonic() > end:
                self.thaw()
                raise Rejected(f"the processes of {self.name} did not stop within {timeout:g} s")
            time.sleep(0.002)

    def thaw(self) -> None:
        """Let them go on."""
        folder = self.folder("freezer")
        if folder is not None:
            v2 = self._is_v2(folder)
            with suppress(OSError):
                (folder / ("cgroup.freeze" if v2 else "freezer.state")).write_text("0" if v2 else "THAWED")

    def kill(self, timeout: float = 10.0) -> None:
        """End all of its processes, also such as fork all the time."""
        end = time.monotonic() + timeout
        while self.pids() and time.monotonic() < end:
            kill = next((folder / "cgroup.kill" for folder in self.folders() if self._is_v2(folder)), None)
            if kill is not None and kill.exists():
                _try(kill, "1")
            with suppress(Unsupported, Rejected, OSError):
                self.freeze(1.0)  # what is frozen cannot fork
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.thaw()
            time.sleep(0.001)

    def oom_kills(self) -> int:
        """How many of its processes the kernel killed for want of memory."""
        folder = self.folder("memory")
        if folder is None:
            return 0
        said = words(folder / ("memory.events" if self._is_v2(folder) else "memory.oom_control"))
        return int(said[said.index("oom_kill") + 1]) if "oom_kill" in said else 0

    def usage(self) -> Usage:
        """Processor time and the peak of memory."""
        memory, cpu = self.folder("memory"), self.folder("cpuacct")
        peak = _first(memory / "memory.peak", memory / "memory.max_usage_in_bytes") if memory else ""
        spent: int | None = None
        if cpu and self._is_v2(cpu):
            said = words(cpu / "cpu.stat")
            spent = int(said[said.index("usage_usec") + 1]) // 1000 if "usage_usec" in said else None
        elif cpu:
            spent = int(_first(cpu / "cpuacct.usage") or 0) // 1_000_000
        return Usage(cpu_ms=spent, peak_memory=int(peak) if peak else None)

    def remove(self, timeout: float = 5.0) -> None:
        """End what is in it and take it away; a second time does nothing."""
        self.kill(timeout)
        end = time.monotonic() + timeout
        for folder in self.folders():
            for inner in [Path(path) for path, _, _ in os.walk(folder, topdown=False)]:
                while inner.is_dir():
                    try:
                        inner.rmdir()
                    except OSError:  # the last process is still being taken down
                        if time.monotonic() > end:
                            break
                        time.sleep(0.002)


def _hand_down(folder: Path) -> None:
    """Version 2: what we got, our groups get through the group that holds them."""
    control = folder.parent / "cgroup.subtree_control"
    for name in words(folder.parent / "cgroup.controllers") if control.exists() else ():
        if name in ("memory", "pids", "cpu", "cpuset"):
            _try(control, f"+{name}")


def _try(path: Path, text: str) -> None:
    with suppress(OSError):
        path.write_text(text)


def _first(*paths: Path) -> str:
    """The text of the first that can be read and is not empty."""
    for path in paths:
        with suppress(OSError):
            if text := path.read_text().strip():
                return text
    return ""


def _cores(text: str) -> list[int]:
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
