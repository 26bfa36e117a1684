"""A live container, whatever runtime started it: the box that runc and gVisor share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from abyssal.base.files import sha256_of, write_json
from abyssal.sandbox import agent_process
from abyssal.sandbox.agent import Agent
from abyssal.sandbox.agent_files import AgentFiles
from abyssal.sandbox.api import Box, Command, Feature, Files, Network, Placed, Process, Usage
from abyssal.sandbox.engines.bundle import SCRUBBED
from abyssal.sandbox.engines.joining import AGENT
from abyssal.sandbox.errors import Cause, Timeout, Unsupported
from abyssal.sandbox.host.cgroups import Group
from abyssal.sandbox.image import pack
from abyssal.sandbox.lasting import Left
from abyssal.sandbox.network.egress import Egress, OverAgent

ANSWER_S = 20.0


class ContainerBox(OverAgent):
    """See `Box`."""

    def __init__(
        self,
        box_id: str,
        placed: Placed,
        features: frozenset[Feature],
        agent: Agent,
        folder: Path,
        upper: Path,
        group: Group | None,
        end: Callable[[], Awaitable[None]],
        copy: Callable[[str, Path], Awaitable[Box]] | None,
        owner: int | None = None,
    ):
        self.id, self.placed, self.features = box_id, placed, features
        self.files: Files = AgentFiles(agent)
        self._agent, self._folder, self._upper, self._group = agent, folder, upper, group
        self._end, self._copy, self._owner = end, copy, owner
        self._egress = Egress(agent, agent.greeting.env)
        self._joining: Network | None = None
        self._here = asyncio.Event()
        self._here.set()
        self._stopped = False
        self._ended_by: Cause | None = None
        agent.cause = self._cause
        if group is not None:
            agent.oom_kills = group.oom_kills

    def ended_by(self, cause: Cause) -> None:
        """Somebody outside is about to kill it, for this reason."""
        self._ended_by = cause

    def _cause(self) -> Cause:
        if self._ended_by is not None:
            return self._ended_by
        if self._stopped:
            return "killed"
        return "oom" if self._group is not None and self._group.oom_kills() else "unknown"

    def handles(self) -> Mapping[str, int]:
        return {AGENT: self._agent.descriptor}

    async def left(self) -> Mapping[str, Left]:
        await self._here.wait()
        return dict(await agent_process.left(self._agent))

    async def taken_over(self, network: Network, *, paused: bool) -> ContainerBox:
        """Have the agent of a dead edge's box again, and its network; where it is paused, once it goes on.

        Raises:
            AgentLost, Timeout: it does not answer; what is left of it is for a sweep.
        """
        self._joining = network
        self._here.clear()
        try:
            if self._group is not None:  # it may have died in the middle of the other
                await asyncio.to_thread(self._group.freeze if paused else self._group.thaw)
            if not paused:
                await self._join()
        except BaseException:
            await self._agent.close()
            raise
        return self

    async def _join(self) -> None:
        if self._joining is None:
            return
        try:
            async with asyncio.timeout(ANSWER_S):
                if await self._agent.first() is None:
                    raise self._agent.why_lost()
        except TimeoutError:
            raise Timeout(f"the agent of sandbox {self.id} did not answer within {ANSWER_S:g} s") from None
        finally:
            self._here.set()
        network, self._joining = self._joining, None
        await self._egress.set(network)

    async def start(self, command: Command) -> Process:
        await self._here.wait()
        env = self._egress.environment(command.env)
        return await agent_process.start(self._agent, replace(command, env=env))

    async def pause(self) -> None:
        if self._group is None:
            raise Unsupported(f"engine {self.placed.engine} cannot pause without control groups: run as root")
        await asyncio.to_thread(self._group.freeze)

    async def resume(self) -> None:
        if self._group is not None:
            await asyncio.to_thread(self._group.thaw)
        await self._join()

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        if memory:
            raise Unsupported(f"engine {self.placed.engine} keeps no memory in snapshots: choose substrate microvm")
        if self.placed.boundary == "user-kernel":  # it keeps writes to itself; a shared one would flush all disks
            await self._agent.sync()
        return await asyncio.to_thread(self._pack, folder)

    def _pack(self, folder: Path) -> Mapping[str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        layer = folder / "layer.erofs"
        if self._group is None:
            pack(self._upper, layer, SCRUBBED, self._owner)
        else:
            self._group.freeze()  # nothing changes meanwhile
            try:
                pack(self._upper, layer, SCRUBBED, self._owner)
            finally:
                self._group.thaw()
        digest = sha256_of(layer)
        write_json(folder / "layer.json", {"digest": digest, "scrubbed": list(SCRUBBED)})
        return {"layer": digest}

    async def fork(self, ids: Sequence[str]) -> Sequence[Box]:
        if self._copy is None:
            raise Unsupported(f"engine {self.placed.engine} cannot fork: choose engine runc")
        layer = self._folder / "fork"
        await self.snapshot(layer)
        copies = [await self._copy(each, layer / "layer.erofs") for each in ids]
        for copy in copies:
            await copy.set_network(self._egress.network)
        return copies

    async def usage(self) -> Usage:
        return Usage() if self._group is None else self._group.usage()

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._here.set()
        await self._egress.close()
        await self._agent.bye()
        await self._end()
        await self._agent.close()


async def connected(box: ContainerBox, network: Network) -> ContainerBox:
    """A new box with its network; stopped where it cannot have it."""
    try:
        await box.set_network(network)
    except BaseException:
        await box.stop()
        raise
    return box
