"""A virtual machine as a sandbox: the agent's commands and files, and what only machines can do."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from abyssal.sandbox import agent_process, wire
from abyssal.sandbox.agent import Agent, Hello
from abyssal.sandbox.agent_files import AgentFiles
from abyssal.sandbox.agent_process import AgentProcess
from abyssal.sandbox.api import Command, Feature, Files, Limits, Placed, Spec, Usage
from abyssal.sandbox.engines.bundle import RUN, claim
from abyssal.sandbox.errors import AgentLost, Cause, Timeout
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.network.egress import Egress, OverAgent
from abyssal.sandbox.vm import disks, memory
from abyssal.sandbox.vm.layer import packed
from abyssal.sandbox.vm.machine import Machine
from abyssal.sandbox.vm.memory import Saved
from abyssal.sandbox.vm.qemu import Hardware

MIB = 1 << 20
FEATURES: frozenset[Feature] = frozenset(
    {"files", "stdin", "tty", "background", "pause", "snapshot", "memory-snapshot", "fork", "network", "ports"}
)
SCRATCH = "scratch.img"
ANSWER = 20.0  # seconds that a live guest has for an answer
_QEMU = 256 * MIB  # what QEMU itself may use besides the guest's memory: translated code above all
_THREADS = 256
_AT_ONCE = 2  # forks that start together; more only get in each other's way


@dataclass(frozen=True)
class Origin:
    """What a box and its forks have in common."""

    spec: Spec
    placed: Placed
    hardware: Hardware
    env: Mapping[str, str]
    state: Path


def bounds(box_id: str, origin: Origin, folder: Path) -> Group:
    """The control group of a box's QEMU; whose it is, is written down first, for a sweep after a crash."""
    claim(origin.placed.engine, box_id, origin.state, folder)
    limits = origin.spec.limits
    most = Limits(cpu=limits.cpu, memory=origin.hardware.memory + _QEMU, pids=_THREADS, disk=limits.disk)
    try:
        return Group.create(box_id, most)
    except BaseException:
        shutil.rmtree(RUN / box_id, ignore_errors=True)
        raise


def unbind(box_id: str, group: Group, folder: Path) -> None:
    """End what is in the group, and take away all that a box has on this host."""
    group.remove()
    shutil.rmtree(RUN / box_id, ignore_errors=True)
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class VmBox(OverAgent):
    """See `Box`."""

    def __init__(self, box_id: str, origin: Origin, folder: Path, machine: Machine, group: Group):
        self.id, self.placed, self.features = box_id, origin.placed, FEATURES
        self._origin, self._folder, self._machine, self._group = origin, folder, machine, group
        self._agent: Agent
        self.files: Files
        self._spent = Usage()
        self._lock = asyncio.Lock()

    @classmethod
    async def awaken(cls, box_id: str, origin: Origin, saved: Saved, folder: Path, scratch: Path) -> VmBox:
        """A box that goes on where a saved machine stood.

        Args:
            box_id: of the new one.
            origin: of the one that was saved.
            saved: its memory.
            folder: of the new one; it gets its disk there.
            scratch: the disk as it was when the memory was saved.
        Raises:
            Timeout: its guest does not answer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        group = bounds(box_id, origin, folder)
        try:
            disks.copy_file(scratch, folder / SCRATCH)
            machine = await memory.restored(box_id, origin.hardware, saved, folder / SCRATCH, group.add)
        except BaseException:
            unbind(box_id, group, folder)
            raise
        return await cls.greeted(box_id, origin, folder, machine, group)

    @classmethod
    async def greeted(cls, box_id: str, origin: Origin, folder: Path, machine: Machine, group: Group) -> VmBox:
        """A box around a machine that runs, whose guest has learnt who it is."""
        box = cls(box_id, origin, folder, machine, group)
        try:
            await box._greet()
        except BaseException:
            with contextlib.suppress(Timeout):
                await box.stop()
            raise
        return box

    async def _greet(self) -> None:
        """The first exchange of an incarnation: whatever was under way in the stream is passed over."""
        first = secrets.randbelow(1 << 30) + (1 << 30)
        hello = Hello(hostname_of(self.id), self._origin.spec.user, self._origin.spec.cwd, self._origin.env)
        machine = self._machine
        machine.writer.write(wire.encode(wire.Kind.HELLO, first, hello.payload()))
        answer = bytes([wire.Kind.READY]) + first.to_bytes(4, "little")
        try:
            async with asyncio.timeout(ANSWER):
                await _skip(machine.reader, answer)
        except TimeoutError as error:
            raise Timeout(f"the guest of {self.id} did not answer within {ANSWER:g} s") from error
        except asyncio.IncompleteReadError as error:
            raise AgentLost(machine.cause(), f"the guest of {self.id} ended before it answered") from error
        self._agent = Agent(machine.reader, machine.writer, first + 1, hello)
        self._agent.cause = self._cause
        self.files = AgentFiles(self._agent)
        self._egress = Egress(self._agent, self._origin.env)
        await self._egress.set(self._origin.spec.network)

    def _cause(self) -> Cause:
        return "oom" if not self._machine.stopped and self._group.oom_kills() else self._machine.cause()

    async def start(self, command: Command) -> AgentProcess:
        user = command.user or self._agent.greeting.user
        command = replace(command, env=self._egress.environment(command.env))
        return await agent_process.start(self._agent, command, caps=user == "root")

    async def pause(self) -> None:
        await self._machine.halt()

    async def resume(self) -> None:
        await self._machine.go()
        await self._agent.hello(self._agent.greeting, ANSWER)  # tells it the time

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        async with self._lock:
            await self._agent.sync()
            folder.mkdir(parents=True, exist_ok=True)
            saved = await self._saved(folder / SCRATCH)
            try:
                digests = {"layer": await asyncio.to_thread(packed, folder / SCRATCH, folder)}
                if memory:
                    await asyncio.to_thread(saved.keep, folder)
                    digests["memory"] = await asyncio.to_thread(lambda: saved.digest)
                else:
                    (folder / SCRATCH).unlink()
                return digests
            finally:
                saved.close()

    async def _saved(self, scratch: Path) -> Saved:
        """Memory and disk of one moment; the machine then goes on."""
        machine = self._machine
        running = (await machine.monitor.run("query-status"))["running"]

        async def taken() -> None:
            await asyncio.to_thread(disks.copy_file, machine.scratch, scratch)
            if running:
                await machine.go()

        await machine.halt()
        try:
            return await memory.save(machine, taken)
        except BaseException:
            if running and not machine.stopped:
                await machine.go()
            raise

    async def fork(self, ids: Sequence[str]) -> Sequence[VmBox]:
        # from its first moment on, under the policy that holds now
        origin = replace(self._origin, spec=replace(self._origin.spec, network=self._egress.network))
        async with self._lock:
            scratch = self._folder / "fork.img"
            saved = await self._saved(scratch)
            turn = asyncio.Semaphore(_AT_ONCE)

            async def child(box_id: str) -> VmBox:
                async with turn:
                    folder = self._folder.with_name(box_id)
                    return await VmBox.awaken(box_id, origin, saved, folder, scratch)

            try:
                made = await asyncio.gather(*map(child, ids), return_exceptions=True)
            finally:
                saved.close()
                scratch.unlink(missing_ok=True)
            boxes = [box for box in made if isinstance(box, VmBox)]
            failed = [error for error in made if isinstance(error, BaseException)]
            if failed:
                await asyncio.gather(*(box.stop() for box in boxes))
                raise failed[0]
            return boxes

    async def usage(self) -> Usage:
        return self._spent if self._machine.stopped else self._group.usage()

    async def stop(self) -> None:
        if self._machine.stopped:
            return
        self._spent = self._group.usage()
        try:
            await self._machine.end()
            if hasattr(self, "_egress"):
                await self._egress.close()
            if hasattr(self, "_agent"):
                await self._agent.close()
        finally:
            await asyncio.to_thread(unbind, self.id, self._group, self._folder)


def hostname_of(box_id: str) -> str:
    """A name that the kernel takes."""
    return "".join(letter if letter.isalnum() else "-" for letter in box_id)[:63]


async def _skip(reader: asyncio.StreamReader, wanted: bytes) -> None:
    """Read up to the end of the frame with this type and number."""
    size, seen = b"", b""
    while not seen.endswith(wanted):
        seen = (seen + await reader.readexactly(1))[-9:]
    size = seen[:4]
    await reader.readexactly(int.from_bytes(size, "little") - len(wanted))
