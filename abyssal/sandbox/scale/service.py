"""The sandboxes of a Ray cluster as one `Service`: nothing is kept here, an id names its edge (sandbox.md 9)."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, NoReturn, Self

import ray
from ray.exceptions import ActorUnavailableError

from abyssal.sandbox.api import Exit, ProcessEvent, Stderr, Stdout
from abyssal.sandbox.errors import Rejected, SandboxError, SandboxLost, Timeout, Unsupported
from abyssal.sandbox.log.blobs import Kept
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.scale.actor import EdgeSettings
from abyssal.sandbox.scale.nodes import AHEAD, NAMESPACE, Node, Nodes
from abyssal.sandbox.service import JSON, Answer, Begun, Wanted

SCHEME = "ray://"
CHOICES = 2
SHOWN = 5  # nodes that an error names


class RayService:
    """Speaks to the edges of a cluster. Made by `RayService.open`.

    Args:
        nodes: of the cluster.
        owner: whether this process was connected to it for this alone.
    """

    def __init__(self, nodes: Nodes, owner: bool):
        self._nodes, self._owner = nodes, owner

    @classmethod
    async def open(cls, where: str = "ray://auto", settings: EdgeSettings | None = None) -> Self:
        """Connect, and have an edge on each node.

        Args:
            where: "ray://auto" for the cluster of this host, or that of RAY_ADDRESS; "ray://HOST:PORT" for the address
                that `ray start` printed. A process that uses Ray already keeps its cluster.
            settings: for edges that do not run yet.
        Raises:
            Timeout: there is no such cluster.
        """
        owner = not ray.is_initialized()
        if owner:
            try:
                await asyncio.to_thread(
                    ray.init, address=where.removeprefix(SCHEME), namespace=NAMESPACE, log_to_driver=False,
                    logging_level="ERROR",
                )  # fmt: skip
            except ConnectionError as error:
                raise Timeout(f"no Ray cluster answers at {where} ({error}): begin one with `ray start`") from None
        service = cls(Nodes(settings or EdgeSettings()), owner)
        await service._nodes.live()
        return service

    async def close(self) -> None:
        if self._owner:
            await asyncio.to_thread(ray.shutdown)

    async def node(self, sandbox: str) -> str:
        """Name of the node that a sandbox is on."""
        return (await self._nodes.of(sandbox)).name

    # creation

    async def create(self, wanted: Wanted, asked: Asked) -> JSON:
        """On the emptier of two random nodes that can run it; where an edge rejects, on another.

        A creation that was asked for before, by its name, is found wherever it is. Two clients that ask for the same
        name at the same moment may get two.
        """
        if wanted.snapshot is not None:
            return await self._create(await self._nodes.of(wanted.snapshot), wanted, _named(asked))
        left = list((await self._nodes.live()).values())
        if asked.op_id is not None:
            known = await asyncio.gather(*(self._knows(node, asked.op_id) for node in left))
            left = [node for node, knows in zip(left, known, strict=True) if knows] or left
        asked = _named(asked)
        random.shuffle(left)
        able: list[tuple[float, Node]] = []
        refused: dict[str, SandboxError] = {}
        while left or able:
            while left and len(able) < CHOICES:
                node = left.pop()
                try:
                    able.append((await self._used(node, wanted), node))
                except (Unsupported, SandboxLost) as error:
                    refused[node.name] = error
            if not able:
                break
            able.sort(key=lambda pair: pair[0])
            node = able.pop(0)[1]
            try:
                return await self._create(node, wanted, asked)
            except (Rejected, SandboxLost) as error:
                refused[node.name] = error
        raise _none(refused)

    async def _create(self, node: Node, wanted: Wanted, asked: Asked) -> JSON:
        return await self._nodes.answer(node, node.actor.ask.remote("create", wanted, asked))

    async def _used(self, node: Node, wanted: Wanted) -> float:
        return await self._nodes.answer(node, node.actor.offer.remote(wanted))

    async def _knows(self, node: Node, op_id: str) -> bool:
        with suppress(SandboxLost):
            return await self._nodes.answer(node, node.actor.created.remote(op_id))
        return False

    # all nodes

    async def _each(self, method: str, *arguments: Any) -> list[Any]:
        """What each node's edge says; one that dies meanwhile says nothing, as it has no sandboxes any more."""
        nodes = list((await self._nodes.live()).values())
        calls = [self._nodes.answer(node, node.actor.ask.remote(method, *arguments)) for node in nodes]
        found = await asyncio.gather(*calls, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, SandboxLost):
                raise each
        return [each for each in found if not isinstance(each, BaseException)]

    async def capabilities(self) -> JSON:
        """Those of each edge."""
        return {"edges": await self._each("capabilities")}

    async def list(self, labels: Mapping[str, str]) -> Sequence[JSON]:
        return [info for found in await self._each("list", dict(labels)) for info in found]

    async def group(
        self, label: str, value: str, action: str, actor: str = "local", only: str | None = None
    ) -> Sequence[str]:
        return [name for found in await self._each("group", label, value, action, actor, only) for name in found]

    # one sandbox

    async def _ask(self, method: str, sandbox: str, *arguments: Any) -> Any:
        node = await self._nodes.of(sandbox)
        return await self._nodes.answer(node, node.actor.ask.remote(method, sandbox, *arguments), sandbox)

    async def info(self, sandbox: str) -> JSON:
        return await self._ask("info", sandbox)

    async def destroy(self, sandbox: str, actor: str = "local") -> None:
        await self._ask("destroy", sandbox, actor)

    async def begin(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Begun:
        return await self._ask("begin", sandbox, req, _named(asked), data)

    async def result(self, sandbox: str, begun: Begun) -> Answer:
        return await self._ask("result", sandbox, begun)

    async def call(self, sandbox: str, req: JSON, asked: Asked, data: bytes | None = None) -> Answer:
        return await self._ask("call", sandbox, req, _named(asked), data)

    async def type(self, sandbox: str, op_id: str, data: bytes, actor: str = "local") -> None:
        await self._ask("type", sandbox, op_id, data, actor)

    async def dial(self, sandbox: str, port: int, actor: str = "local") -> NoReturn:
        """Not through Ray, whose calls are no connections.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(f"port {port} of {sandbox} does not lead through Ray: connect to its node's own server")

    async def operations(self, sandbox: str) -> Sequence[JSON]:
        return await self._ask("operations", sandbox)

    async def stored(self, sandbox: str, op_id: str, name: str) -> Kept:
        return await self._ask("stored", sandbox, op_id, name)

    async def resolve(self, sandbox: str, op_id: str, res: JSON, actor: str = "local") -> None:
        await self._ask("resolve", sandbox, op_id, res, actor)

    async def events(self, sandbox: str, op_id: str, stdout: int = 0, stderr: int = 0) -> AsyncIterator[ProcessEvent]:
        at = {Stdout: stdout, Stderr: stderr}
        while True:
            try:
                async with aclosing(self._follow(sandbox, "events", op_id, at[Stdout], at[Stderr])) as events:
                    async for event in events:
                        if not isinstance(event, Exit):
                            at[type(event)] = event.offset + len(event.data)
                        yield event
                return
            except ActorUnavailableError:
                await self.info(sandbox)

    async def log(self, sandbox: str, from_seq: int = 0, *, follow: bool = False) -> AsyncIterator[JSON]:
        while True:
            try:
                async with aclosing(self._follow(sandbox, "log", from_seq, follow=follow)) as records:
                    async for record in records:
                        from_seq = record["seq"] + 1
                        yield record
                return
            except ActorUnavailableError:
                await self.info(sandbox)

    async def _follow(self, sandbox: str, method: str, *arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """Items of a stream. Ray does not begin it again, as another edge cuts it elsewhere: who reads it does."""
        node = await self._nodes.of(sandbox)
        begun = node.actor.follow.options(max_task_retries=0, _generator_backpressure_num_objects=AHEAD)
        items = begun.remote(method, sandbox, *arguments, **options)
        over = False
        try:
            async for item in items:
                yield await self._nodes.answer(node, item, sandbox)
            over = True
        finally:
            if not over:
                ray.cancel(items)


def _named(asked: Asked) -> Asked:
    """With a name: Ray sends a call again when an edge is restarted, and it is to run once."""
    if asked.op_id is not None or asked.place is not None:
        return asked
    return replace(asked, op_id=f"op-{secrets.token_hex(8)}")


def _none(refused: Mapping[str, SandboxError]) -> SandboxError:
    """Why no node took it: room comes back, what a host cannot do does not."""
    why = "; ".join(f"{name}: {error}" for name, error in sorted(refused.items())[:SHOWN])
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    if any(isinstance(error, Rejected) for error in refused.values()):
        return Rejected(f"no node of the Ray cluster has room ({why}{more}): try again later")
    return Unsupported(f"no node of the Ray cluster can run it ({why}{more})")
