"""Plain subprocesses in a folder of their own: no sandbox at all, for tests of what stands above engines.

It holds nothing in: commands run as the user who runs the platform, on his files and his network. So it has to be
asked for with `allow_unsafe=True` and says so in everything that it makes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from abyssal.base.files import write_aside
from abyssal.sandbox.api import Box, Command, Feature, Files, Network, Placed, Probe, Spec, Substrate, Usage, shell
from abyssal.sandbox.engines.process_files import HostFiles
from abyssal.sandbox.engines.process_run import HostProcess
from abyssal.sandbox.errors import AgentLost, ImageError, NotFound, Unsupported

MARK = "ABYSSAL_BOX"
OPERATION = "ABYSSAL_OPERATION"
PLACED = Placed(
    engine="process",
    boundary="process",
    degraded=(
        "nothing is isolated: commands run as a plain subprocess of the host",
        "limits and network policies are not enforced",
    ),
)
FEATURES: frozenset[Feature] = frozenset({"files", "stdin", "tty", "background", "pause", "snapshot", "fork"})
LAYER = "layer.tar"


def marked(mark: str, value: str) -> Iterator[int]:
    """Processes whose environment holds the mark, also those that left their session."""
    wanted = f"{mark}={value}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)
            except OSError:  # gone, or somebody else's
                continue


def kill_marked(mark: str, value: str, number: int) -> None:
    """Signal them all; for SIGKILL, until none is left."""
    for _ in range(100):
        found = False
        for pid in marked(mark, value):
            found = True
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if not found or number != signal.SIGKILL:
            return


class ProcessBox:
    """A folder, and the processes that were started in it."""

    def __init__(self, box_id: str, spec: Spec, folder: Path):
        self.id, self.spec, self.folder = box_id, spec, folder
        self.placed, self.features = PLACED, FEATURES
        self._places = HostFiles(folder)
        self.files: Files = self._places
        self._stopped = False

    async def start(self, command: Command) -> HostProcess:
        if self._stopped:
            raise AgentLost("killed", f"sandbox {self.id} was stopped")
        operation = f"{self.id}/{os.urandom(8).hex()}"
        cwd = self._places.place(command.cwd or self.spec.cwd)
        if not cwd.is_dir():
            raise NotFound(f"no folder {command.cwd or self.spec.cwd} in sandbox {self.id}")
        env = {
            "PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder / "work"), "LANG": "C.UTF-8",
            "TMPDIR": str(self.folder / "tmp"), "TZ": "UTC", "PYTHONHASHSEED": "0",
            **self.spec.env, **command.env, MARK: self.id, OPERATION: operation,
        }  # fmt: skip
        return await HostProcess.start(command, cwd, env, lambda number: kill_marked(OPERATION, operation, number))

    async def pause(self) -> None:
        kill_marked(MARK, self.id, signal.SIGSTOP)

    async def resume(self) -> None:
        kill_marked(MARK, self.id, signal.SIGCONT)

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        if memory:
            raise Unsupported("engine process cannot keep memory: take a snapshot of the disk alone")
        return await asyncio.to_thread(self._pack, folder)

    def _pack(self, folder: Path) -> Mapping[str, str]:
        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
            return member

        folder.mkdir(parents=True, exist_ok=True)
        with write_aside(folder / LAYER) as aside, tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(self.folder / "work", "work", filter=plain)  # members come sorted
        with open(folder / LAYER, "rb") as file:
            return {"layer": hashlib.file_digest(file, "sha256").hexdigest()}

    async def fork(self, ids: Sequence[str]) -> Sequence[Box]:
        folders = {box_id: self.folder.with_name(box_id) for box_id in ids}
        for folder in folders.values():
            await asyncio.to_thread(shutil.copytree, self.folder, folder, symlinks=True, dirs_exist_ok=True)
        return [ProcessBox(box_id, self.spec, folder) for box_id, folder in folders.items()]

    async def set_network(self, network: Network) -> None:
        raise Unsupported("engine process cannot hold a network policy")

    async def usage(self) -> Usage:
        return Usage()

    async def stop(self) -> None:
        self._stopped = True
        kill_marked(MARK, self.id, signal.SIGKILL)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


class ProcessEngine:
    """Makes such boxes.

    Args:
        allow_unsafe: has to be True.
    Raises:
        Unsupported: it is not.
    """

    name = "process"
    substrates: tuple[Substrate, ...] = ("function", "container")
    features = FEATURES

    def __init__(self, *, allow_unsafe: bool = False):
        self.lasting, self.state = True, None
        if not allow_unsafe:
            raise Unsupported("engine process isolates nothing: give allow_unsafe=True, for tests only")

    async def probe(self) -> Probe:
        process = await asyncio.create_subprocess_exec(*shell("exit 7"))
        code = await process.wait()
        return Probe(code == 7, PLACED if code == 7 else None, "a subprocess answered; it is no sandbox")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> ProcessBox:
        if spec.image != "host":
            raise Unsupported(f"engine process knows the image host only, not {spec.image}")
        if spec.network.mode == "allow":
            raise Unsupported("engine process cannot hold a network policy")
        for name in ("work", "tmp"):
            (folder / name).mkdir()
        return ProcessBox(box_id, spec, folder)

    async def restore(self, box_id: str, spec: Spec, folder: Path, snapshot: Path) -> ProcessBox:
        if not (snapshot / LAYER).is_file():
            raise ImageError(f"no snapshot of engine process lies in {snapshot}")
        box = await self.create(box_id, spec, folder)
        with tarfile.open(snapshot / LAYER) as tar:
            await asyncio.to_thread(tar.extractall, folder, filter="tar")
        return box

    async def adopt(
        self, box_id: str, spec: Spec, folder: Path, handles: Mapping[str, int], *, paused: bool
    ) -> ProcessBox:
        if not (folder / "work").is_dir():
            raise AgentLost("unknown", f"the folder of sandbox {box_id} is gone")
        kill_marked(MARK, box_id, signal.SIGKILL)  # their pipes ended with the process that held them
        return ProcessBox(box_id, spec, folder)

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        return ()  # all that a box has lies in its folder, and processes die when it is swept there
