"""Containers by gVisor: programs meet a kernel that runs as a program itself, not the host's (sandbox.md 3).

Debian's release of 2022 runs on kernels of today on the platform `ptrace`, which every host has and which is slow; where
another release is installed and offers `systrap`, that is taken.
"""

from __future__ import annotations

import subprocess
from functools import cached_property
from pathlib import Path

from abyssal.sandbox.api import Boundary, Feature, Placed
from abyssal.sandbox.engines.bundle import RUN
from abyssal.sandbox.engines.runc import RuncEngine


class GvisorEngine(RuncEngine):
    """See `Engine`; it takes the same bundles as runc.

    Args:
        state: folder of layers, images and programs built here.
    """

    name = "gvisor"
    program = "runsc"
    package = "runsc"
    boundary: Boundary = "user-kernel"
    filtered = False
    features: frozenset[Feature] = frozenset({"files", "stdin", "tty", "background", "pause", "snapshot", "fork"})

    @property
    def placed(self) -> Placed:
        return Placed(self.name, self.boundary, degraded=(*self._hierarchies.missing(), "pids-soft"))

    @cached_property
    def platform(self) -> str:
        """How programs are caught at system calls: the fastest that this release has and that needs no virtual machine."""
        said = subprocess.run([self.program, "flags"], capture_output=True, text=True, check=False)
        return "systrap" if "systrap" in said.stdout + said.stderr else "ptrace"

    def command(self, box_id: str, *arguments: str) -> list[str]:
        options = [f"--platform={self.platform}", "--network=none", "--ignore-cgroups", "--host-uds=open"]
        return [self.program, "--root", str(RUN / self.name), *options[:3], *arguments, box_id]
