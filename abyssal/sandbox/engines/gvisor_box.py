"""A container in gVisor, whose memory can be kept: by a checkpoint, which ends it, and from which it goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abyssal.base.files import sha256_of, write_json
from abyssal.sandbox.api import Box, Spec
from abyssal.sandbox.engines.bundle import SCRUBBED
from abyssal.sandbox.engines.container import LAYER, ContainerBox
from abyssal.sandbox.errors import ImageError, Unsupported
from abyssal.sandbox.host import mounts
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.image import Image, from_json, pack
from abyssal.sandbox.stream import Ends

FILE, DISK = "memory.json", "disk.img"
CHECKPOINT = "checkpoint.img"  # as the runtime names it
DELETED = " (deleted)"
PATIENCE_S, STEP_S = 1.0, 0.02


@dataclass(frozen=True)
class Kept:
    """What lies beside a checkpoint.

    Attributes:
        token: by which its agent knows a host.
        reached: number of the last operation that the agent was given.
        image: that its container had, with all layers.
        name: of the image that was asked for.
        limits: of its container.
        maker: release of the runtime.
    """

    token: str
    reached: int
    image: Mapping[str, Any]
    name: str
    limits: Mapping[str, Any]
    maker: str

    @classmethod
    def read(cls, folder: Path) -> Kept:
        """Of a snapshot with memory.

        Raises:
            ImageError: it is damaged.
        """
        try:
            return cls(**json.loads((folder / FILE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ImageError(f"the snapshot in {folder} is damaged: {error}") from None

    def fits(self, spec: Spec, maker: str) -> None:
        """Compare with what is asked for.

        Raises:
            Unsupported: what is in the memory cannot be changed.
        """
        if self.maker != maker:
            raise Unsupported(f"memory kept by {self.maker} cannot go on in {maker}: take the snapshot again")
        if self.name != spec.image or self.limits != asdict(spec.limits):
            asked = f"image {self.name} and limits {dict(self.limits)}"
            raise Unsupported(f"memory goes on under what it began with: ask for {asked}, or for a snapshot without")

    @property
    def layers(self) -> Image:
        """The image again."""
        return from_json(self.image)


@dataclass(frozen=True)
class Runtime:
    """What a box needs of its engine.

    Attributes:
        save: see `GvisorEngine.save`.
        awaken: see `GvisorEngine.awaken`.
        maker: release of the runtime.
    """

    save: Callable[[str, Path, Group, Ends, Path, Callable[[], None]], Awaitable[None]]
    awaken: Callable[[str, Spec, Path, Path], Awaitable[Box]]
    maker: str


class GvisorBox(ContainerBox):
    """See `Box`."""

    _runtime: Runtime
    _spec: Spec
    _image: Image

    def remembering(self, runtime: Runtime, spec: Spec, image: Image) -> GvisorBox:
        """Have its memory in snapshots and forks."""
        self._runtime, self._spec, self._image = runtime, spec, image
        self._saving = asyncio.Lock()
        return self

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        if not memory or "memory-snapshot" not in self.features:
            return await super().snapshot(folder, memory=memory)
        await self._save(folder, layer=True)
        return {**self._packed(folder), "memory": await asyncio.to_thread(sha256_of, folder / CHECKPOINT)}

    async def fork(self, ids: Sequence[str]) -> Sequence[Box]:
        if "memory-snapshot" not in self.features:
            return await super().fork(ids)
        kept = self._folder / "fork"
        copies: list[Box] = []
        try:
            await self._save(kept, layer=False)
            for each in ids:
                folder = self._folder.with_name(each)
                folder.mkdir(exist_ok=True)
                spec = replace(self._spec, network=self._egress.network)
                copies.append(await self._runtime.awaken(each, spec, folder, kept))
        except BaseException:
            await asyncio.gather(*(copy.stop() for copy in copies))
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, kept, ignore_errors=True)
        return copies

    async def _save(self, folder: Path, *, layer: bool) -> None:
        """Memory and disk of one moment; whoever gives up waiting does not leave it standing still."""

        async def saved() -> None:
            async with self._saving:
                await self._saved(folder, layer)

        await asyncio.shield(asyncio.ensure_future(saved()))

    async def stop(self) -> None:
        async with self._saving:
            await super().stop()

    async def _saved(self, folder: Path, layer: bool) -> None:
        group = self._group
        if self._stopped or self._agent.lost or group is None:
            raise self._agent.why_lost()
        if self._paused:
            await asyncio.to_thread(group.thaw)  # a checkpoint is written by what stands still otherwise
        try:
            await _nothing_deleted(group)
            await self._agent.sync()
            folder.mkdir(parents=True, exist_ok=True)

            def meanwhile() -> None:
                mounts.flush(self._folder / "disk")
                mounts.copy_disk(self._folder / DISK, folder / DISK)
                if layer:
                    pack(self._upper, folder / LAYER, SCRUBBED, self._owner)

            token, reached = self._agent.greeting.token.hex(), self._agent.reached
            await self._runtime.save(self.id, self._folder, group, self._agent.ends, folder, meanwhile)
            about = (asdict(self._image), self._spec.image, asdict(self._spec.limits), self._runtime.maker)
            write_json(folder / FILE, asdict(Kept(token, reached, *about)))
            for name in (FILE, CHECKPOINT, DISK):
                (folder / name).chmod(0o600)
        finally:
            if self._paused:
                await asyncio.to_thread(group.freeze)


async def _nothing_deleted(group: Group) -> None:
    """Wait until no deleted file is open: gVisor cannot keep one, and would end with the attempt.

    Raises:
        Unsupported: one stays open.
    """
    until = asyncio.get_running_loop().time() + PATIENCE_S
    while found := await asyncio.to_thread(_deleted, group):
        if asyncio.get_running_loop().time() > until:
            raise Unsupported(
                f"gVisor keeps no memory while a deleted file is open ({found}): close it, or keep the disk alone"
            )
        await asyncio.sleep(STEP_S)


def _deleted(group: Group) -> str:
    """The name of a file that is open in a group though it is deleted, or nothing."""
    for pid in group.pids():
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    name = str(link.readlink())
                    if name.endswith(DELETED) and not name.startswith("/memfd:"):
                        return name.removesuffix(DELETED)
    return ""
