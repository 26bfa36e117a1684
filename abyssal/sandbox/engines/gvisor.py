"""Containers by gVisor: programs meet a kernel that runs as a program itself, not the host's (sandbox.md 3).

Debian's release of 2022 runs on kernels of today on the platform `ptrace`, which every host has and which is slow. It
refuses AT_NO_AUTOMOUNT, so `ls` and `stat` of coreutils 9 fail in it (Python and git do not mind); `degraded` says so.
Where another release is installed and offers `systrap`, that is taken.
"""

from __future__ import annotations

import subprocess
from functools import cached_property

from abyssal.sandbox.api import Boundary, Feature, Placed
from abyssal.sandbox.engines.bundle import RUN
from abyssal.sandbox.engines.runc import RuncEngine
from abyssal.sandbox.host.cgroups import Group

ORPHANS = "this release of gVisor may leave orphans of a command running until the sandbox ends"
INTERRUPT = "this release of gVisor does not make an interrupt of control-C in a terminal"
OLD = ("this release of gVisor has no ls and stat of coreutils 9", ORPHANS, INTERRUPT)
SHARED = "pids-soft: counted with the threads of its kernel; who passes the memory limit ends the whole sandbox"


class GvisorEngine(RuncEngine):
    """See `Engine`; it takes the same bundles as runc.

    Args:
        state: folder of layers, images and programs built here.
    """

    name = "gvisor"
    program = "runsc"
    boundary: Boundary = "user-kernel"
    filtered = False
    own_pids = 256
    features: frozenset[Feature] = frozenset(
        {"files", "stdin", "tty", "background", "pause", "snapshot", "fork", "network", "ports"}
    )

    @property
    def placed(self) -> Placed:
        old = OLD if self.platform == "ptrace" else ()
        return Placed(self.name, self.boundary, degraded=(*self._hierarchies.missing(), SHARED, *old))

    @cached_property
    def platform(self) -> str:
        """How programs are caught at system calls: the fastest of this release that needs no virtual machine."""
        said = subprocess.run([self.program, "flags"], capture_output=True, text=True, check=False)
        return "systrap" if "systrap" in said.stdout + said.stderr else "ptrace"

    def within(self, group: Group) -> list[str]:
        """A shell that enters the group first: gVisor's helpers are made before its first process is known."""
        enter = 'while [ "$1" != -- ]; do echo $$ > "$1"; shift; done; shift; exec "$@"'
        return ["sh", "-c", enter, "sh", *(str(folder / "cgroup.procs") for folder in group.folders()), "--"]

    def command(self, box_id: str, *arguments: str) -> list[str]:
        # what is bound is this host's programs and read-only: gVisor need not ask for each file whether it has changed
        bound = "--file-access-mounts=exclusive"
        options = [f"--platform={self.platform}", "--network=none", "--ignore-cgroups", bound]
        return [self.program, "--root", str(RUN / self.name), *options, *arguments, box_id]
