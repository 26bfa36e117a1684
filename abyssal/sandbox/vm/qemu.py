"""What QEMU is told: the hardware of a guest as plain data, and the command line for it (sandbox.md 3).

Every file and socket is an inherited descriptor, so that QEMU needs no folder of ours, and none of it has a name that
somebody else could open. Two machines whose `Hardware` is equal can load each other's memory.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from abyssal.sandbox.api import Accel
from abyssal.sandbox.errors import Unsupported

PROGRAM = "qemu-system-x86_64"
PORT = "abyssal"


@dataclass(frozen=True)
class Hardware:
    """A guest's hardware.

    Attributes:
        machine: "microvm" has virtio devices on plain memory; "q35" is a whole PC with firmware.
        accel: how its processors run.
        cpus: how many.
        memory: bytes.
        kernel, initramfs: that QEMU itself starts; None where the disk is booted by the firmware.
        command_line: of the kernel, if QEMU starts it.
        layers: EROFS files, lowest first; their serial numbers are L0, L1 and so on.
        disk: a qcow2 disk to boot from; its serial number is "disk".
    """

    machine: Literal["microvm", "q35"]
    accel: Accel
    cpus: int
    memory: int
    kernel: Path | None = None
    initramfs: Path | None = None
    command_line: str = ""
    layers: tuple[Path, ...] = ()
    disk: Path | None = None


@dataclass(frozen=True)
class Wires:
    """Descriptors that QEMU inherits: three sockets, the file that is the guest's memory, and its disks' files."""

    monitor: int
    agent: int
    console: int
    memory: int
    scratch: int
    kernel: int | None
    initramfs: int | None
    disk: int | None
    layers: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        single = (self.monitor, self.agent, self.console, self.memory, self.scratch)
        maybe = (self.kernel, self.initramfs, self.disk)
        return (*single, *(fd for fd in maybe if fd is not None), *self.layers)


@cache
def version() -> str:
    """What QEMU says of itself.

    Raises:
        Unsupported: there is none.
    """
    try:
        done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unsupported(f"virtual machines need {PROGRAM}: run `apt-get install qemu-system-x86`") from error
    return done.stdout.splitlines()[0]


def kernel_line(memory: int, pids: int, layers: str, khz: int, accel: Accel) -> str:
    """The kernel's command line: what `boot` and the agent read there, and what spares time and noise.

    Args:
        memory: bytes that programs may use.
        pids: processes that they may be.
        layers: serial numbers of disks with layers, lowest first.
        khz: of the time stamp counter.
        accel: how its processors run.
    """
    # they act on what a real processor does ahead of time; translated, they are nothing but more to translate
    mitigations = " mitigations=off" if accel == "tcg" else ""
    return " ".join(
        [
            "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic",
            f"tsc_early_khz={khz} tsc=reliable clocksource=tsc",
            "audit=0 apparmor=0 psi=0 lsm=landlock,yama 8250.nr_uarts=1 random.trust_cpu=on" + mitigations,
            "sysctl.vm.dirty_writeback_centisecs=6000",  # a disk that ends with its guest is in no hurry
            "sysctl.vm.overcommit_memory=1",  # the limit is the group's; a large request alone is no failure
            f"abyssal.port={PORT} abyssal.memory={memory} abyssal.pids={pids}",
            f"abyssal.layers={layers} abyssal.scratch=scratch",
        ]
    )


def argv(hardware: Hardware, wires: Wires, *, shared: bool, incoming: bool) -> list[str]:
    """QEMU's command line.

    Args:
        hardware: of the guest.
        wires: descriptors.
        shared: whether what the guest writes to memory changes the file, or is the guest's alone.
        incoming: wait for a saved state instead of starting up.
    """
    micro = hardware.machine == "microvm"
    bus = "device" if micro else "pci"
    words = [PROGRAM, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none", "-S"]
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    words += ["-name", "abyssal", "-M", _machine(micro), *_accel(hardware.accel)]
    words += ["-smp", str(hardware.cpus), "-m", f"{hardware.memory // 1024}K"]
    words += ["-object", _memory(hardware, wires, shared)]
    words += ["-chardev", f"socket,id=monitor,fd={wires.monitor}", "-mon", "chardev=monitor,mode=control"]
    words += ["-chardev", f"socket,id=console,fd={wires.console}", "-serial", "chardev:console"]
    words += ["-device", f"virtio-serial-{bus}", "-chardev", f"socket,id=agent,fd={wires.agent}"]
    words += ["-device", f"virtserialport,chardev=agent,name={PORT}", "-device", f"virtio-rng-{bus}"]
    if wires.kernel is not None and wires.initramfs is not None:
        words += ["-kernel", f"/proc/self/fd/{wires.kernel}", "-initrd", f"/proc/self/fd/{wires.initramfs}"]
        words += ["-append", hardware.command_line]
    number = 0
    if wires.disk is not None:
        words += _drive(bus, number, wires.disk, "disk", "qcow2", writable=False)
        number += 1
    for index, layer in enumerate(wires.layers):
        words += _drive(bus, number, layer, f"L{index}", "raw", writable=False)
        number += 1
    words += _drive(bus, number, wires.scratch, "scratch", "raw", writable=True)
    return [*words, "-incoming", "defer"] if incoming else words


def _machine(micro: bool) -> str:
    if micro:  # the old timers too: processors that are emulated have nothing better
        return "microvm,pic=on,pit=on,rtc=on,acpi=on,auto-kernel-cmdline=off,isa-serial=on,memory-backend=ram"
    return "q35,usb=off,vmport=off,smbus=off,sata=off,memory-backend=ram"


def _accel(accel: Accel) -> list[str]:
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host,-arch-capabilities"]
    return ["-accel", "tcg,tb-size=64,thread=multi", "-cpu", "max"]


def _memory(hardware: Hardware, wires: Wires, shared: bool) -> str:
    path = f"/proc/self/fd/{wires.memory}"
    return f"memory-backend-file,id=ram,size={hardware.memory},mem-path={path},share={'on' if shared else 'off'}"


def _drive(bus: str, number: int, fd: int, serial: str, form: str, *, writable: bool) -> list[str]:
    """A disk whose file is an open descriptor; what is lost when the host crashes is lost anyway, so never flushed."""
    file = f"driver=file,node-name=f{number},filename=/dev/fdset/{number},locking=off,cache.no-flush=on"
    reading = "off" if writable else "on"
    boot = ",bootindex=0" if serial == "disk" else ""
    return [
        *("-add-fd", f"fd={fd},set={number}"),
        *("-blockdev", f"{file},read-only={reading},discard=unmap"),
        *("-blockdev", f"driver={form},node-name=d{number},file=f{number},read-only={reading},discard=unmap"),
        *("-device", f"virtio-blk-{bus},drive=d{number},serial={serial}{boot}"),
    ]
