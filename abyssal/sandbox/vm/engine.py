"""What the engines of virtual machines share: choosing hardware, starting cold or from a template, probes.

The first sandbox of a kind starts cold, and its machine is kept as a template before its caller has spoken to the
guest; all later ones of this kind go on from there. A kind is everything that could make a difference: programs,
kernel, layers, limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path

from abyssal.base.errors import AbyssalError
from abyssal.base.files import write_folder
from abyssal.sandbox import packages
from abyssal.sandbox.api import Accel, Boundary, Feature, Limits, Placed, Probe, Spec, Substrate
from abyssal.sandbox.engines.bundle import claimed
from abyssal.sandbox.engines.placing import check
from abyssal.sandbox.errors import AgentLost, Timeout, Unsupported
from abyssal.sandbox.guest import build
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
from abyssal.sandbox.image import Image, Store
from abyssal.sandbox.vm import disks, memory, qemu
from abyssal.sandbox.vm.accel import LIMIT, Found, found
from abyssal.sandbox.vm.box import FEATURES, SCRATCH, Origin, VmBox, bounds, unbind
from abyssal.sandbox.vm.host_layer import host_image
from abyssal.sandbox.vm.initramfs import initramfs
from abyssal.sandbox.vm.kernel import Kernel, kernel
from abyssal.sandbox.vm.machine import Machine
from abyssal.sandbox.vm.memory import Saved
from abyssal.sandbox.vm.qemu import Hardware
from abyssal.sandbox.vm.rehearsal import FIRST, heard, rehearse

MIB = 1 << 20
COLD = 90.0  # seconds that a guest has to start, on a busy host with emulated processors
_KERNEL = 96 * MIB  # of the guest's memory for its kernel, so that the programs' limit is all theirs
_LEAST = 32 * MIB
_TEMPLATES = 8  # kept on disk


class MachineEngine:
    """Base of the engines; they differ in the hardware that they ask for."""

    name: str
    substrates: tuple[Substrate, ...]
    features: frozenset[Feature] = FEATURES

    def __init__(self, state: Path, *, templates: bool = True):
        """Prepare nothing yet.

        Args:
            state: folder of kernels, images and templates; nothing in there is taken to be trusted by guests.
            templates: whether to keep and use them.
        """
        self._state = state / "vm"
        self._store = Store(state)
        self._templates = templates
        self._host: Image | None = None
        self._saved: dict[str, Saved] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def _hardware(self, guest: Kernel, first: Path, base: Hardware, limits: Limits) -> Hardware:
        """What this engine makes of accel, processors, memory and layers, for a kernel and its first root."""
        raise NotImplementedError

    async def probe(self) -> Probe:
        try:
            with tempfile.TemporaryDirectory() as name:
                begin = time.monotonic()
                folder = Path(name) / "box"
                folder.mkdir()
                spec = Spec(self.substrates[0], cwd="/tmp")
                box = await self.create(f"probe-{self.name}-{time.time_ns()}", spec, folder)
                took = time.monotonic() - begin
                await box.stop()
        except (AbyssalError, OSError) as error:
            return Probe(False, None, f"no guest answered: {error}", packages.remedy(self.name))
        return Probe(True, box.placed, f"a guest answered after {took:.1f} s; {(await self._accel()).why}")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> VmBox:
        placed = await self._placed(spec)
        image = await asyncio.to_thread(self._image, spec.image)
        hardware = await asyncio.to_thread(self._plan, spec, placed.accel, image)
        origin = Origin(spec, placed, hardware, {**image.env, **spec.env}, self._state)
        kind = _kind(hardware, spec.limits.disk)
        async with self._locks.setdefault(kind, asyncio.Lock()):
            saved = self._saved.get(kind) or self._load(kind)
            if saved is None:
                return await self._cold(box_id, origin, folder, kind)
        return await VmBox.awaken(box_id, origin, saved, folder, self._template(kind) / SCRATCH)

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        found = claimed(self.name, self._state)
        gone = sorted(set(found) - alive)
        for box_id in gone:
            await asyncio.to_thread(unbind, box_id, Group.left(box_id), found[box_id])
        return gone

    def close(self) -> None:
        """Forget the templates in memory; boxes that run keep what they need."""
        while self._saved:
            self._saved.popitem()[1].close()

    async def _placed(self, spec: Spec) -> Placed:
        if spec.limits.memory < _LEAST:
            raise Unsupported(f"machines need a memory limit of {_LEAST // MIB} MiB, got {spec.limits.memory} bytes")
        how = (await self._accel()).accel
        boundary: Boundary = "vm-hardware" if how == "kvm" else "vm-emulated"
        placed = Placed(self.name, boundary, how, Hierarchies.find().missing())
        check(self.name, self.substrates, self.features, placed, spec)
        return placed

    async def _accel(self) -> Found:
        return await found(self._state, self._with_kvm)

    async def _with_kvm(self) -> float:
        """Seconds until a guest that the processor runs itself has answered."""
        begin = time.monotonic()
        image = await asyncio.to_thread(self._image, "host")
        hardware = await asyncio.to_thread(self._plan, Spec(self.substrates[0]), "kvm", image)
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name) / SCRATCH
            await asyncio.to_thread(disks.scratch, scratch, 64 * MIB)
            ram = memory.anonymous("ram", hardware.memory)
            machine = await Machine.start("kvm-trial", hardware, ram, scratch, shared=True)
            try:
                await machine.go()
                async with _hearing(machine, LIMIT):
                    await heard(machine.reader)  # the agent's first word
            finally:
                await machine.end()
        return time.monotonic() - begin

    def _plan(self, spec: Spec, how: Accel, image: Image) -> Hardware:
        """The hardware, after whatever it needs has been built."""
        guest, first = self._guest
        size = -(-(spec.limits.memory + _KERNEL) // (2 * MIB)) * 2 * MIB
        layers = tuple(self._store.layer(digest) for digest in image.layers)
        base = Hardware("microvm", how, math.ceil(spec.limits.cpu), size, layers=layers)
        return self._hardware(guest, first, base, spec.limits)

    @cached_property
    def _guest(self) -> tuple[Kernel, Path]:
        """Kernel and first root, built at their first use."""
        guest, programs = kernel(self._state), self._state / "programs"
        boot, agent = build.build(programs, "boot", ["boot.c"]), build.agent(programs)
        return guest, initramfs(self._state, guest, boot, agent)

    def _image(self, name: str) -> Image:
        if name != "host":
            return self._store.get(name)
        if self._host is None:
            self._host = host_image(self._store)
        return self._host

    async def _cold(self, box_id: str, origin: Origin, folder: Path, kind: str) -> VmBox:
        scratch = folder / SCRATCH
        group = bounds(box_id, origin, folder)
        try:
            await asyncio.to_thread(disks.scratch, scratch, origin.spec.limits.disk)
            ram = memory.anonymous("ram", origin.hardware.memory)
            machine = await Machine.start(box_id, origin.hardware, ram, scratch, shared=True, admit=group.add)
            try:
                await machine.go()
                async with _hearing(machine):
                    await heard(machine.reader)  # the agent's first word
                if self._templates:
                    async with _hearing(machine):
                        await rehearse(machine.reader, machine.writer)
                    await machine.halt()
                    await self._make_template(kind, machine, scratch)
            except BaseException:
                await machine.end()
                raise
        except BaseException:
            unbind(box_id, group, folder)
            raise
        return await VmBox.greeted(box_id, origin, folder, machine, group)

    async def _make_template(self, kind: str, machine: Machine, scratch: Path) -> None:
        """Of a machine that stands still; it goes on afterwards."""
        with tempfile.TemporaryDirectory(dir=scratch.parent) as name:

            async def taken() -> None:
                await asyncio.to_thread(disks.copy_file, scratch, Path(name) / SCRATCH)
                await machine.go()

            self._saved[kind] = await memory.save(machine, taken)
            await asyncio.to_thread(self._keep, kind, Path(name) / SCRATCH)

    def _template(self, kind: str) -> Path:
        return self._state / "templates" / kind

    def _load(self, kind: str) -> Saved | None:
        folder = self._template(kind)
        if not self._templates or not folder.exists():
            return None
        self._saved[kind] = Saved.load(folder)
        return self._saved[kind]

    def _keep(self, kind: str, scratch: Path) -> None:
        folder = self._template(kind)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with write_folder(folder) as aside:
            self._saved[kind].keep(aside)
            disks.copy_file(scratch, aside / SCRATCH)
        others = sorted(folder.parent.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)
        for old in others[:-_TEMPLATES]:
            if old.name not in self._saved:
                shutil.rmtree(old, ignore_errors=True)


def _kind(hardware: Hardware, disk: int) -> str:
    """A name for machines that can stand in for each other; files count by name, which is a digest or a version."""
    return hashlib.sha256(f"{qemu.version()} {disk} {hardware} {FIRST}".encode()).hexdigest()[:32]


@asynccontextmanager
async def _hearing(machine: Machine, limit: float = COLD) -> AsyncIterator[None]:
    """Whoever reads from a guest in here learns why nothing comes."""
    try:
        async with asyncio.timeout(limit):
            yield
    except TimeoutError as error:
        said = machine.console[-300:] or "nothing"
        raise Timeout(f"the guest did not answer within {limit:g} s; its kernel said: {said}") from error
    except asyncio.IncompleteReadError as error:
        raise AgentLost(machine.cause(), f"the guest ended; its kernel said: {machine.console[-300:]}") from error
