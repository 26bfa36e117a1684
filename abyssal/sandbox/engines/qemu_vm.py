"""The engine "qemu-vm": a whole PC, whose firmware starts a boot loader from its disk.

The disk holds boot loader, kernel and the lowest layer of the image; further layers are disks of their own. What the
guest writes goes to the sandbox's own disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from abyssal.sandbox.api import Limits, Substrate
from abyssal.sandbox.vm import disks, qemu
from abyssal.sandbox.vm.clock import counter_khz
from abyssal.sandbox.vm.engine import MachineEngine
from abyssal.sandbox.vm.kernel import Kernel
from abyssal.sandbox.vm.qemu import Hardware


class QemuVmEngine(MachineEngine):
    """See `Engine`."""

    name = "qemu-vm"
    substrates: tuple[Substrate, ...] = ("vm",)

    def _hardware(self, guest: Kernel, first: Path, base: Hardware, limits: Limits) -> Hardware:
        lowest, *others = base.layers
        names = ",".join(["disk:2", *(f"L{index}" for index in range(len(others)))])
        line = qemu.kernel_line(limits.memory, limits.pids, names, counter_khz(self._state), base.accel)
        digest = hashlib.sha256(f"{guest.digest} {first.name} {lowest.name} {line}".encode()).hexdigest()
        disk = self._state / "disks" / f"{digest[:32]}.qcow2"
        if not disk.exists():
            disk.parent.mkdir(parents=True, exist_ok=True)
            disks.bootable(disk, guest.compressed, first, line, lowest)
        return replace(base, machine="q35", layers=tuple(others), disk=disk)
