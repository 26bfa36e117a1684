"""The engine "qemu-microvm": small machines without firmware or PCI, whose kernel QEMU starts itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from abyssal.sandbox.api import Limits, Substrate
from abyssal.sandbox.vm import qemu
from abyssal.sandbox.vm.clock import counter_khz
from abyssal.sandbox.vm.engine import MachineEngine
from abyssal.sandbox.vm.kernel import Kernel
from abyssal.sandbox.vm.qemu import Hardware


class QemuMicrovmEngine(MachineEngine):
    """See `Engine`."""

    name = "qemu-microvm"
    substrates: tuple[Substrate, ...] = ("microvm",)

    def _hardware(self, guest: Kernel, first: Path, base: Hardware, limits: Limits) -> Hardware:
        names = ",".join(f"L{index}" for index in range(len(base.layers)))
        line = qemu.kernel_line(limits.memory, limits.pids, names, counter_khz(self._state), base.accel)
        return replace(base, machine="microvm", kernel=guest.plain, initramfs=first, command_line=line)
