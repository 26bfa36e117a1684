"""Containers by bubblewrap, for hosts where nobody is root (sandbox.md 3, rule 3).

One user, whose number outside is that of whoever runs the platform, or a number of nobody where that is root. The
host's programs are shown read-only; `/work`, the home and temporary folders can be written. Limits are control groups
where some can be made, else limits of the process and a watchdog, and then `degraded` says so.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from abyssal.base.errors import AbyssalError
from abyssal.sandbox import packages
from abyssal.sandbox.agent import USERS, Agent, Hello
from abyssal.sandbox.api import Box, Command, Exit, Feature, Placed, Probe, Spec, Substrate
from abyssal.sandbox.engines.bundle import (
    AGENT,
    FIRST_OWNER,
    HOSTNAME,
    MASKED,
    RANGES,
    RUN,
    claim,
    claimed,
    cores_folder,
    reachable_agent,
)
from abyssal.sandbox.engines.bundle import remove as bundle_remove
from abyssal.sandbox.engines.container import ContainerBox, connected
from abyssal.sandbox.engines.first import First
from abyssal.sandbox.engines.joining import Joining, new_token
from abyssal.sandbox.engines.placing import check, whole
from abyssal.sandbox.engines.watchdog import watch
from abyssal.sandbox.errors import AgentLost, ImageError, Unsupported
from abyssal.sandbox.guest import build
from abyssal.sandbox.host import mounts, seccomp
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.host.hierarchies import Hierarchies
from abyssal.sandbox.host_image import fill, programs

START_S, END_S = 20.0, 2.0
WRITABLE = {"work": 0o755, "home/user": 0o755, "var/tmp": 0o777}
FEATURES: frozenset[Feature] = frozenset({"files", "stdin", "tty", "background", "snapshot", "network", "ports"})
ALWAYS = ("disk-soft", "one user only", "outside of /work, the home and temporary folders nothing can be written")


class BwrapEngine:
    """See `Engine`.

    Args:
        state: folder of what is built here.
    """

    name = "bwrap"
    substrates: tuple[Substrate, ...] = ("container",)

    def __init__(self, state: Path):
        self.state = state
        self.lasting = False
        self._root: tuple[Path, tuple[str, ...]] | None = None
        self._is_root = os.geteuid() == 0
        self._hierarchies = Hierarchies.find()
        self._soft = self._hierarchies.missing()
        more: frozenset[Feature] = frozenset() if self._soft else frozenset({"pause"})
        self.features: frozenset[Feature] = FEATURES | more

    @property
    def placed(self) -> Placed:
        """What boxes of this engine are on this host."""
        return Placed(self.name, "shared-kernel", degraded=(*self._soft, *ALWAYS))

    async def probe(self) -> Probe:
        remedy = packages.remedy(self.name)
        if shutil.which("bwrap") is None:
            return Probe(False, None, "bwrap is not on PATH", remedy)
        begin = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="probe.", dir=self.state) as folder:
                box = await self.create(f"probe-{secrets.token_hex(4)}", Spec("container"), Path(folder))
                try:
                    process = await box.start(Command(("/bin/true",), timeout=10))
                    ends = [event async for event in process.events() if isinstance(event, Exit)]
                finally:
                    await box.stop()
        except (AbyssalError, OSError) as error:
            return Probe(False, None, f"a trial container did not run: {error}", remedy)
        if ends[0].code:
            return Probe(False, None, f"a trial command ended with {ends[0].code}")
        return Probe(True, self.placed, f"a container ran a command in {time.monotonic() - begin:.2f} s")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        check(self.name, self.substrates, self.features, self.placed, spec)
        if spec.image != "host":
            raise ImageError(f"engine bwrap shows image 'host' alone, not {spec.image!r}: use engine runc as root")
        if spec.user != "user":
            raise Unsupported("engine bwrap has one user, 'user': use engine runc as root")
        return await whole(self._create(box_id, spec, folder))

    async def _create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        root, binds = await asyncio.to_thread(self._host_root)
        owner = FIRST_OWNER + secrets.randbelow(RANGES) if self._is_root else os.geteuid()
        place = RUN / box_id if self._is_root else folder
        group: Group | None = None
        child: asyncio.subprocess.Process | None = None
        agent: Agent | None = None
        try:
            await asyncio.to_thread(self._own, box_id, folder, owner)
            if not self._soft:
                group = Group.create(box_id, spec.limits, self._hierarchies)
            cores = (group.cores() if group else None) or math.ceil(spec.limits.cpu)
            child, agent = await self._launch(self._command(spec, place, root, binds, cores), folder, owner)
            first = First.below(child.pid)
            if group is not None:
                group.add(first.pid)
            token = new_token()
            hello = Hello(HOSTNAME, spec.user, spec.cwd, spec.env, machine_id="", token=token)
            await agent.hello(hello, START_S)
            if self.lasting:
                Joining(token.hex(), hello.env, {"first": [first.pid, first.began]}).write(folder)
        except BaseException:
            if child is not None and child.returncode is None:
                child.kill()
                await child.wait()
            if group is not None:
                await asyncio.to_thread(group.remove)
            await asyncio.to_thread(_remove, folder, RUN / box_id)
            if agent is not None:
                await agent.close()
            raise
        return await connected(self._box(box_id, spec, folder, group, agent, first, child), spec.network)

    async def adopt(self, box_id: str, spec: Spec, folder: Path, handles: Mapping[str, int], *, paused: bool) -> Box:
        known = await asyncio.to_thread(Joining.read, box_id, folder)
        first = First(*known.more["first"])
        if not first.lives:
            raise AgentLost("killed", f"sandbox {box_id} has ended")
        group = None if self._soft else await asyncio.to_thread(Group.left, box_id)
        hello = Hello(HOSTNAME, spec.user, spec.cwd, known.env, machine_id="", token=bytes.fromhex(known.token))
        agent = await known.again(folder, handles, hello)
        return await self._box(box_id, spec, folder, group, agent, first).taken_over(spec.network, paused=paused)

    def _box(
        self,
        box_id: str,
        spec: Spec,
        folder: Path,
        group: Group | None,
        agent: Agent,
        first: First,
        child: asyncio.subprocess.Process | None = None,
    ) -> ContainerBox:
        async def end() -> None:
            dog.cancel()
            await first.gone(END_S)
            if group is not None:
                await asyncio.to_thread(group.remove)
            else:
                first.kill()
            if child is not None:
                await child.wait()
            await asyncio.to_thread(_remove, folder, RUN / box_id)

        upper, uid = folder / "upper", USERS["user"].uid
        box = ContainerBox(box_id, self.placed, self.features, agent, folder, upper, group, end, None, uid)
        dog = asyncio.create_task(watch(first.pid, upper, spec.limits, box.ended_by, memory=group is None))
        return box

    def _host_root(self) -> tuple[Path, tuple[str, ...]]:
        """The root that all boxes share, read-only; made once, until the folder that it lies in is emptied."""
        if self._root is None:
            if self._is_root:
                RUN.mkdir(mode=0o711, exist_ok=True)
            place = (RUN if self._is_root else self.state) / "host-root"
            if not place.exists():
                with tempfile.TemporaryDirectory(dir=place.parent, prefix=".host-root.") as scratch:
                    fill(Path(scratch) / "root")
                    with suppress(FileExistsError, OSError):  # somebody else was first
                        (Path(scratch) / "root").rename(place)
            self._root = (place, programs())
        return self._root

    def _own(self, box_id: str, folder: Path, owner: int) -> None:
        """What the box writes, under its owner and on a way that the owner can go."""
        for name, mode in WRITABLE.items():
            path = folder / "upper" / name
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(mode)
            if self._is_root:
                os.chown(path, owner, owner)
        if self._is_root:
            claim(self.name, box_id, self.state, folder)
            place = RUN / box_id / "upper"
            place.mkdir(mode=0o711)
            mounts.bind(folder / "upper", place)

    def _command(self, spec: Spec, place: Path, root: Path, binds: Sequence[str], cores: int) -> list[str]:
        user, limits = USERS["user"], spec.limits
        agent = reachable_agent(self.state) if self._is_root else build.agent(self.state / "programs")
        bounds = ["prlimit", f"--fsize={limits.disk}", "--core=0", "--nofile=1024:4096"]
        if self._soft:
            bounds += [f"--data={limits.memory}", f"--nproc={limits.pids}", "taskset", "-c", _some_cores(cores)]
        shown = ["--ro-bind", str(root), "/"]
        for name in binds:
            shown += ["--ro-bind", name, name]
        for name in WRITABLE:
            shown += ["--bind", str(place / "upper" / name), f"/{name}"]
        shown += ["--proc", "/proc", *_masks(), "--dev", "/dev", "--size", str(limits.memory // 2), "--tmpfs", "/tmp"]
        shown += ["--size", str(limits.memory // 2), "--tmpfs", "/dev/shm", "--tmpfs", "/run"]
        shown += ["--ro-bind", str(agent), AGENT]
        shown += ["--ro-bind", str(cores_folder(place, cores)), "/sys", "--remount-ro", "/run"]
        apart = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(user.uid), "--gid", str(user.gid)]
        apart += ["--hostname", HOSTNAME, "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
        if not self.lasting:
            apart.append("--die-with-parent")
        return [*bounds, "bwrap", *apart, *shown, "--clearenv", "--chdir", "/"]

    async def _launch(
        self, command: Sequence[str], folder: Path, owner: int
    ) -> tuple[asyncio.subprocess.Process, Agent]:
        ours, theirs = socket.socketpair()
        filter_fd = os.memfd_create("filter")
        try:
            os.write(filter_fd, seccomp.as_program())
            os.lseek(filter_fd, 0, os.SEEK_SET)
            whole = [*command, "--seccomp", str(filter_fd), AGENT, "--fd", "0"]
            other = owner if self._is_root else None
            groups: list[str | int] | None = None if other is None else []
            with theirs, open(folder / "runtime.log", "wb") as log:
                child = await asyncio.create_subprocess_exec(
                    *whole,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=log,
                    pass_fds=(filter_fd,),
                    user=other,
                    group=other,
                    extra_groups=groups,
                )
        finally:
            os.close(filter_fd)
        reader, writer = await asyncio.open_connection(sock=ours)
        agent = Agent(reader, writer)
        if (await agent.first()) is None:
            await child.wait()
            said = (folder / "runtime.log").read_text(errors="replace").strip()[-500:]
            raise ImageError(f"bwrap cannot start a container: {said or f'exit code {child.returncode}'}")
        return child, agent

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        found = claimed(self.name, self.state)
        gone = sorted(set(found) - alive)
        for box_id in gone:
            await asyncio.to_thread(Group.left(box_id).remove)
            await asyncio.to_thread(_remove, found[box_id], RUN / box_id)
        return gone


def _masks() -> list[str]:
    """What `/proc` shows of the whole host, covered."""
    options = []
    for name in MASKED:
        path = Path("/proc") / name
        if path.is_dir():
            options += ["--tmpfs", str(path), "--remount-ro", str(path)]
        elif path.exists():
            options += ["--ro-bind", "/dev/null", str(path)]
    return options


def _some_cores(count: int) -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))


def _remove(folder: Path, place: Path) -> None:
    bundle_remove(folder, place)
    shutil.rmtree(folder / "upper", ignore_errors=True)
    shutil.rmtree(folder / "sys", ignore_errors=True)
