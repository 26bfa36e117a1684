"""Containers by gVisor: programs meet a kernel that runs as a program itself, not the host's (sandbox.md 3).

Debian's release of 2022 runs on kernels of today on the platform `ptrace`, which every host has and which is slow. It
refuses AT_NO_AUTOMOUNT, so `ls` and `stat` of coreutils 9 fail in it (Python and git do not mind); `degraded` says so.
Where another release is installed and offers `systrap`, that is taken.

A checkpoint ends the container that it is made of; the container goes on from it under another name of the runtime,
and copies beside it. Its agent finds the stream of the original as it was, for which that is of pipes (`stream`), and
in a copy another one, in which the host names itself by the agent's token. Whether all this works is tried once.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from abyssal.base.errors import AbyssalError
from abyssal.base.files import write_json
from abyssal.sandbox import agent_process, stream
from abyssal.sandbox.agent import Agent, Hello
from abyssal.sandbox.api import Boundary, Box, Command, Exit, Feature, Placed, Probe, Spec
from abyssal.sandbox.engines.bundle import RUN
from abyssal.sandbox.engines.gvisor_box import CHECKPOINT, DISK, GvisorBox, Kept, Runtime
from abyssal.sandbox.engines.joining import first_of, joins_of
from abyssal.sandbox.engines.placing import check, whole
from abyssal.sandbox.engines.runc import START_S, RuncEngine
from abyssal.sandbox.errors import AgentLost, ImageError, SandboxError, Timeout
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.image import Image
from abyssal.sandbox.stream import Ends

ORPHANS = "this release of gVisor may leave orphans of a command running until the sandbox ends"
INTERRUPT = "this release of gVisor does not make an interrupt of control-C in a terminal"
OLD = ("this release of gVisor has no ls and stat of coreutils 9", ORPHANS, INTERRUPT)
SHARED = "pids-soft: counted with the threads of its kernel; who passes the memory limit ends the whole sandbox"
FORGETFUL = "this release of gVisor keeps no memory here: snapshots and forks have the disk alone"
MEMORY_S = 120.0  # to write a checkpoint or to read it
TRIED = "gvisor-memory.json"  # what the trial found, until this host starts again
BOOT = Path("/proc/sys/kernel/random/boot_id")
FEATURES: frozenset[Feature] = frozenset(
    {"files", "stdin", "tty", "background", "pause", "snapshot", "memory-snapshot", "fork", "network", "ports"}
)


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
    features: frozenset[Feature] = FEATURES

    def __init__(self, state: Path):
        super().__init__(state)
        # why memory cannot be kept; nothing where it can, None where nobody has tried since this host started
        self._fault: str | None = self._known() if (RUN / TRIED).exists() else None
        self.features = FEATURES - {"memory-snapshot"} if self._fault else FEATURES
        self._trying = asyncio.Lock()

    @property
    def placed(self) -> Placed:
        old = OLD if self.platform == "ptrace" else ()
        forgetful = (FORGETFUL,) if self._fault else ()
        return Placed(self.name, self.boundary, degraded=(*self._hierarchies.missing(), SHARED, *old, *forgetful))

    @cached_property
    def platform(self) -> str:
        """How programs are caught at system calls: the fastest of this release that needs no virtual machine."""
        said = subprocess.run([self.program, "flags"], capture_output=True, text=True, check=False)
        return "systrap" if "systrap" in said.stdout + said.stderr else "ptrace"

    @cached_property
    def release(self) -> str:
        """Of the runtime."""
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        return said.stdout.partition("\n")[0].strip()

    async def probe(self) -> Probe:
        self._fault = self._fault or ""  # first, whether it runs at all
        found = await super().probe()
        if not found.ok:
            return found
        async with self._trying:
            await self._try_memory()
        memory = f"; memory is not kept: {self._fault}" if self._fault else "; memory was kept, and went on in a copy"
        return replace(found, placed=self.placed, detail=found.detail + memory)

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        await self._learn()
        return await super().create(box_id, spec, folder)

    async def adopt(self, box_id: str, spec: Spec, folder: Path, handles: Mapping[str, int], *, paused: bool) -> Box:
        await self._learn()
        return await super().adopt(box_id, spec, folder, handles, paused=paused)

    async def restore(self, box_id: str, spec: Spec, folder: Path, snapshot: Path) -> Box:
        await self._learn()
        if not (snapshot / CHECKPOINT).is_file():
            return await super().restore(box_id, spec, folder, snapshot)
        check(self.name, self.substrates, self.features, self.placed, spec)
        Kept.read(snapshot).fits(spec, self.release)
        return await self.awaken(box_id, spec, folder, snapshot)

    async def _learn(self) -> None:
        """Whether memory can be kept, by a trial where nobody knows."""
        async with self._trying:
            if self._fault is None:
                await self._try_memory()

    def _known(self) -> str | None:
        try:
            said = json.loads((RUN / TRIED).read_bytes())
            return str(said["fault"]) if said["of"] == self._tried_with() else None
        except (OSError, ValueError, KeyError):
            return None

    def _tried_with(self) -> list[str]:
        return [BOOT.read_text().strip(), self.program, self.release]

    async def _try_memory(self) -> None:
        self._fault, self.features = "", FEATURES
        with tempfile.TemporaryDirectory(prefix="probe.", dir=self.state) as name:
            folder = Path(name) / f"memory-{Path(name).name[6:].lower()}"
            folder.mkdir()
            box = await super().create(folder.name, Spec("container"), folder)
            try:
                copies = await box.fork([f"{box.id}-copy"])
                try:
                    for each in (box, *copies):
                        process = await each.start(Command(("/bin/true",), timeout=10))
                        ends = [event async for event in process.events() if isinstance(event, Exit)]
                        if ends[0].code:
                            self._fault = f"a trial command ended with {ends[0].code}"
                finally:
                    for copy in copies:
                        await copy.stop()
            except (AbyssalError, OSError) as error:
                self._fault = str(error)[-300:]
            finally:
                await box.stop()
        self.features = FEATURES - {"memory-snapshot"} if self._fault else FEATURES
        write_json(RUN / TRIED, {"of": self._tried_with(), "fault": self._fault})

    def _box(
        self, box_id: str, spec: Spec, folder: Path, image: Image, upper: Path, group: Group, agent: Agent
    ) -> GvisorBox:
        box = self._box_of(GvisorBox, box_id, spec, folder, image, upper, group, agent)
        return box.remembering(Runtime(self.save, self.awaken, self.release), spec, image)

    async def save(
        self, box_id: str, folder: Path, group: Group, ends: Ends, into: Path, meanwhile: Callable[[], None]
    ) -> None:
        """Write a checkpoint of a box, and have the box go on from it.

        Args:
            box_id, folder, group: of the box.
            ends: ours of its stream, which stays as it is.
            into: folder for the checkpoint.
            meanwhile: done while the box stands still.
        Raises:
            ImageError, Timeout: no checkpoint was written; the box may have ended of it.
            AgentLost: the box did not go on.
        """
        theirs = stream.others(ends)
        try:
            last = self.names(box_id)[-1]
            after = _name(box_id, int(last.split(".")[-2]) + 1)  # the last is free when its parent has waited for it
            await self._checkpoint(last, into, group)
            await asyncio.to_thread(group.kill)  # the last of what stood around it
            try:
                await asyncio.to_thread(meanwhile)
            finally:
                try:
                    await self._restart(after, folder, group, theirs, into)
                except SandboxError as error:
                    await asyncio.to_thread(group.kill)
                    raise AgentLost("unknown", f"the sandbox did not go on from its checkpoint: {error}") from error
        finally:
            theirs.close()

    async def _checkpoint(self, name: str, into: Path, group: Group) -> None:
        command = self.command(name, "checkpoint", "--image-path", str(into))
        runtime = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(MEMORY_S):
                _, said = await runtime.communicate()
        except TimeoutError as error:
            runtime.kill()
            await asyncio.to_thread(group.kill)  # it stands still
            raise Timeout(f"{self.program} did not write a checkpoint within {MEMORY_S:g} s") from error
        if runtime.returncode:
            raise ImageError(f"{self.program} cannot write a checkpoint: {said.decode(errors='replace')[:300]}")

    async def _restart(self, name: str, folder: Path, group: Group, theirs: Ends, kept: Path) -> None:
        await self._run(name, folder, group, theirs, "restore", "--image-path", str(kept), patience=MEMORY_S)

    async def awaken(self, box_id: str, spec: Spec, folder: Path, kept: Path) -> Box:
        """A box that goes on from what another one's snapshot left in a folder.

        Args:
            box_id, spec, folder: of the new one.
            kept: the folder.
        Raises:
            ImageError, Timeout, AgentLost: it does not.
        """
        about = await asyncio.to_thread(Kept.read, kept)
        begin = partial(self._go_on, kept, about)
        return await whole(self._create(box_id, spec, folder, about.layers, kept / DISK, begin))

    async def _go_on(self, kept: Path, about: Kept, box_id: str, folder: Path, group: Group, hello: Hello) -> Agent:
        """Start a copy of an agent, and have it know that it is one."""
        ours, theirs = self.ends()
        old = replace(hello, token=bytes.fromhex(about.token))
        agent = await Agent.rejoin(ours, old, first_of(joins_of(about.reached) + 1))
        try:
            try:
                await self._restart(self.names(box_id)[-1], folder, group, theirs, kept)
            finally:
                theirs.close()
            async with asyncio.timeout(START_S):
                if await agent.first() is None:
                    raise agent.why_lost()
            for left in (await agent_process.left(agent)).values():
                await left.settle()  # they go on; whoever waits for them waits for the original's
            await agent.hello(hello, START_S)
        except TimeoutError as error:
            await agent.close()
            raise Timeout(f"the copy {box_id} did not answer within {START_S:g} s") from error
        except BaseException:
            await agent.close()
            raise
        return agent

    def ends(self) -> tuple[Ends, Ends]:
        return stream.pipes()

    def names(self, box_id: str) -> Sequence[str]:
        pattern = re.compile(rf"{re.escape(box_id)}\.(\d+)\._sandbox:.*\.state")
        found = [match for path in (RUN / self.name).glob("*.state") if (match := pattern.fullmatch(path.name))]
        return [_name(box_id, number) for number in sorted(int(match[1]) for match in found) or [0]]

    def within(self, group: Group) -> list[str]:
        """A shell that enters the group first: gVisor's helpers are made before its first process is known."""
        enter = 'while [ "$1" != -- ]; do echo $$ > "$1"; shift; done; shift; exec "$@"'
        return ["sh", "-c", enter, "sh", *(str(folder / "cgroup.procs") for folder in group.folders()), "--"]

    def command(self, box_id: str, *arguments: str) -> list[str]:
        # what is bound is this host's programs and read-only: gVisor need not ask for each file whether it has changed
        bound = "--file-access-mounts=exclusive"
        options = [f"--platform={self.platform}", "--network=none", "--ignore-cgroups", bound]
        return [self.program, "--root", str(RUN / self.name), *options, *arguments, box_id]


def _name(box_id: str, number: int) -> str:
    """One of the names that the runtime has for a box; it takes the beginning of a name for the whole."""
    return f"{box_id}.{number}."
