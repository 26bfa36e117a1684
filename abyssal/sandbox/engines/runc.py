"""Containers by runc: the kernel is shared, everything else is the container's own (sandbox.md 3, 8)."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from abyssal.base.errors import AbyssalError
from abyssal.sandbox import packages
from abyssal.sandbox.agent import Agent, Hello
from abyssal.sandbox.api import Boundary, Box, Command, Exit, Feature, Placed, Probe, Spec, Substrate
from abyssal.sandbox.engines import bundle
from abyssal.sandbox.engines.bundle import RUN, Root
from abyssal.sandbox.engines.container import ContainerBox, connected
from abyssal.sandbox.engines.joining import Joining, new_token
from abyssal.sandbox.engines.placing import check, whole
from abyssal.sandbox.errors import AgentLost, ImageError, Timeout
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
from abyssal.sandbox.host_image import host_image
from abyssal.sandbox.image import Image, Store, from_json

START_S = 20.0


class RuncEngine:
    """See `Engine`.

    Args:
        state: folder of layers, images and programs built here.
    """

    name = "runc"
    program = "runc"
    boundary: Boundary = "shared-kernel"
    filtered = True
    own_pids = 0  # threads that the runtime itself keeps among the container's
    substrates: tuple[Substrate, ...] = ("container",)
    features: frozenset[Feature] = frozenset(
        {"files", "stdin", "tty", "background", "pause", "snapshot", "fork", "network", "ports"}
    )

    def __init__(self, state: Path):
        self.state = state
        self.lasting = False
        self.store = Store(state)
        self._host: Image | None = None
        self._hierarchies = Hierarchies.find()

    @property
    def placed(self) -> Placed:
        """What boxes of this engine are on this host."""
        return Placed(self.name, self.boundary, degraded=self._hierarchies.missing())

    async def probe(self) -> Probe:
        if shutil.which(self.program) is None:
            return Probe(False, None, f"{self.program} is not on PATH", packages.remedy(self.name))
        begin = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="probe.", dir=self.state) as folder:
                box = await self.create(f"probe-{Path(folder).name[6:].lower()}", Spec("container"), Path(folder))
                try:
                    process = await box.start(Command(("/bin/true",), timeout=10))
                    ends = [event async for event in process.events() if isinstance(event, Exit)]
                finally:
                    await box.stop()
        except (AbyssalError, OSError) as error:
            return Probe(False, None, f"a trial container did not run: {error}", packages.remedy(self.name))
        if ends[0].code:
            return Probe(False, None, f"a trial command ended with {ends[0].code}")
        return Probe(True, self.placed, f"a container ran a command in {time.monotonic() - begin:.2f} s")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        check(self.name, self.substrates, self.features, self.placed, spec)
        image = await asyncio.to_thread(self._image, spec.image)
        return await whole(self._create(box_id, spec, folder, image))

    async def restore(self, box_id: str, spec: Spec, folder: Path, snapshot: Path) -> Box:
        check(self.name, self.substrates, self.features, self.placed, spec)
        layer = snapshot / "layer.erofs"
        if not layer.is_file():
            raise ImageError(f"no layer of a container lies in {snapshot}")
        image = await asyncio.to_thread(self._image, spec.image)
        added = await asyncio.to_thread(self.store.add, layer)
        return await whole(self._create(box_id, spec, folder, _grown(image, added)))

    def _image(self, name: str) -> Image:
        if name != "host":
            return self.store.get(name)
        if self._host is None:
            self._host = host_image(self.store)
        return self._host

    async def _create(self, box_id: str, spec: Spec, folder: Path, image: Image) -> Box:
        program = await asyncio.to_thread(bundle.reachable_agent, self.state)
        root = await asyncio.to_thread(Root.mount, self.name, box_id, folder, spec, image, self.store)
        group: Group | None = None
        agent: Agent | None = None
        try:
            group = Group.create(box_id, replace(spec.limits, pids=spec.limits.pids + self.own_pids), self._hierarchies)
            cores = group.cores() or math.ceil(spec.limits.cpu)
            settings = bundle.config(spec, root, image, program, cores, group.path, filtered=self.filtered)
            (folder / "config.json").write_text(json.dumps(settings))
            agent = await self._launch(box_id, folder, group)
            token = new_token()
            hello = Hello(bundle.HOSTNAME, spec.user, spec.cwd, {**image.env, **spec.env}, token=token)
            await agent.hello(hello, START_S)
            if self.lasting:
                Joining(token.hex(), hello.env, {"image": asdict(image)}).write(folder)
        except BaseException:
            await self._end(box_id, folder, group)
            if agent is not None:
                await agent.close()
            raise

        return await connected(self._box(box_id, spec, folder, image, root.upper, group, agent), spec.network)

    async def adopt(self, box_id: str, spec: Spec, folder: Path, handles: Mapping[str, int], *, paused: bool) -> Box:
        known = await asyncio.to_thread(Joining.read, box_id, folder)
        group = await asyncio.to_thread(Group.left, box_id)
        if not group.folders():
            raise AgentLost("killed", f"the control group of sandbox {box_id} is gone")
        image = from_json(known.more["image"])
        hello = Hello(bundle.HOSTNAME, spec.user, spec.cwd, known.env, token=bytes.fromhex(known.token))
        agent = await known.again(folder, handles, hello)
        upper = Root(folder, RUN / box_id, 0).upper
        return await self._box(box_id, spec, folder, image, upper, group, agent).taken_over(spec.network, paused=paused)

    def _box(
        self, box_id: str, spec: Spec, folder: Path, image: Image, upper: Path, group: Group, agent: Agent
    ) -> ContainerBox:
        async def end() -> None:
            await self._end(box_id, folder, group)

        async def copy(new_id: str, layer: Path) -> Box:
            grown = _grown(image, self.store.add(layer))
            new_folder = folder.parent / new_id
            new_folder.mkdir(exist_ok=True)
            return await self._create(new_id, spec, new_folder, grown)

        return ContainerBox(box_id, self.placed, self.features, agent, folder, upper, group, end, copy)

    def within(self, group: Group) -> list[str]:
        """What comes before the runtime's command line; runc puts the container into its group by itself."""
        return []

    def command(self, box_id: str, *arguments: str) -> list[str]:
        """The runtime's command line."""
        return [self.program, "--root", str(RUN / self.name), *arguments, box_id]

    async def _launch(self, box_id: str, folder: Path, group: Group) -> Agent:
        ours, theirs = socket.socketpair()
        with theirs, open(folder / "runtime.log", "w+b") as log:
            pid_file = folder / "pid"
            arguments = ["run", "--detach", "--bundle", str(folder), "--pid-file", str(pid_file)]
            command = [*self.within(group), *self.command(box_id, *arguments)]
            runtime = await asyncio.create_subprocess_exec(
                *command, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=log, start_new_session=True
            )
            try:
                async with asyncio.timeout(START_S):
                    code = await runtime.wait()
            except TimeoutError as error:
                runtime.kill()
                raise Timeout(f"{self.program} did not start a container within {START_S:g} s") from error
            if code:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()[-500:]
                raise ImageError(f"{self.program} cannot start a container: {said or f'exit code {code}'}")
            group.add(int(pid_file.read_text()))
        reader, writer = await asyncio.open_connection(sock=ours)
        return Agent(reader, writer)

    async def _end(self, box_id: str, folder: Path, group: Group | None) -> None:
        if group is not None:
            await asyncio.to_thread(group.kill)  # for what still lives, the runtime waits a tenth of a second
        with suppress(OSError):
            delete = self.command(box_id, "delete", "--force")
            runtime = await asyncio.create_subprocess_exec(
                *delete,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a runtime that kills its own group must not mean ours
            )
            await runtime.wait()
        if group is not None:
            await asyncio.to_thread(group.remove)
        await asyncio.to_thread(bundle.remove, folder, RUN / box_id)

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        found = bundle.claimed(self.name, self.state)
        gone = sorted(set(found) - alive)
        for box_id in gone:
            await self._end(box_id, found[box_id], Group.left(box_id))
        return gone


def _grown(image: Image, layer: str) -> Image:
    """The image with a layer on top; workspace and toolkit below it can no more be told apart."""
    return replace(image, workspace=(*image.layers[len(image.base) :], layer), toolkit=())
