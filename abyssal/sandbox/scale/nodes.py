"""The nodes of a Ray cluster and the edge of each: Ray pins, names, finds and restarts them (sandbox.md 9)."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from abyssal.sandbox.errors import NotFound, SandboxError, SandboxLost
from abyssal.sandbox.scale.actor import EdgeActor, EdgeSettings

NAMESPACE = "abyssal"
REFRESH_S = 5.0
AT_ONCE = 10_000  # calls of one edge; most of them wait for a command
AHEAD = 64  # items of a stream that are sent before they are read


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        name: its address, or what `ray start --node-name` called it; one edge for each name.
        ray_id: Ray's, another after each start.
        alive: whether Ray reaches it.
        actor: the handle of its edge; None where the node is gone.
    """

    name: str
    ray_id: str
    alive: bool
    actor: Any = None

    @property
    def edge(self) -> str:
        """Id of its edge: the same after the node was started anew, so its folder is found again."""
        return edge_id(self.name)

    def gone(self, sandbox: str | None = None) -> SandboxLost:
        """The error for a node that is gone."""
        what = "its sandboxes are" if sandbox is None else f"sandbox {sandbox} is"
        return SandboxLost(f"Ray node {self.name} does not answer, and {what} lost with it: create others")


def edge_id(node_name: str) -> str:
    """Id of the edge of a node."""
    return hashlib.sha256(node_name.encode()).hexdigest()[:8]


class Nodes:
    """Nodes of the cluster that this process is connected to; looked up anew from time to time.

    Args:
        settings: for edges that do not run yet.
    """

    def __init__(self, settings: EdgeSettings):
        self._settings = settings
        self._known: dict[str, Node] = {}
        self._read = -REFRESH_S
        self._lock = threading.Lock()

    async def live(self) -> Mapping[str, Node]:
        """Those that live, by the ids of their edges."""
        return {edge: node for edge, node in (await self._all()).items() if node.alive}

    async def of(self, sandbox: str) -> Node:
        """The node that a sandbox's id, or a snapshot's, names.

        Raises:
            NotFound: the cluster never had it.
            SandboxLost: it is gone.
        """
        edge = sandbox.partition("/")[0].rpartition("-")[0]
        node = (await self._all()).get(edge) or (await self._all(anew=True)).get(edge)
        if node is None:
            raise NotFound(f"no sandbox {sandbox}: no node of this Ray cluster has edge {edge!r}")
        if not node.alive:
            raise node.gone(sandbox)
        return node

    async def _all(self, *, anew: bool = False) -> dict[str, Node]:
        if anew or time.monotonic() - self._read > REFRESH_S:
            await asyncio.to_thread(self._refresh)
        return self._known

    async def answer(self, node: Node, call: Awaitable[Any], sandbox: str | None = None) -> Any:
        """What a call of a node's edge gives.

        Raises:
            SandboxError: that the edge raised.
            SandboxLost: the node is gone.
            ActorUnavailableError: the edge is being restarted, and the call is not one that Ray sends again.
        """
        try:
            return await call
        except RayTaskError as error:
            if isinstance(error.cause, SandboxError):
                raise error.cause from None
            raise
        except ActorUnavailableError:
            raise
        except (RayActorError, ActorUnschedulableError):
            self._known.pop(node.edge, None)
            self._read = -REFRESH_S
            raise node.gone(sandbox) from None

    def _refresh(self) -> None:
        with self._lock:
            found: dict[str, Node] = {}
            for entry in sorted(ray.nodes(), key=lambda entry: entry["Alive"]):  # one that lives replaces one that died
                node = Node(entry["NodeName"], entry["NodeID"], entry["Alive"])
                old = self._known.get(node.edge)
                if node.alive and old is not None and old.ray_id == node.ray_id:
                    node = old
                elif node.alive:
                    node = Node(node.name, node.ray_id, True, self._edge(node))
                found[node.edge] = node
            self._known, self._read = found, time.monotonic()

    def _edge(self, node: Node) -> Any:
        actor = ray.remote(EdgeActor).options(
            name=f"edge-{node.edge}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False), num_cpus=0,
            max_restarts=-1, max_task_retries=-1, max_concurrency=AT_ONCE,
        )  # fmt: skip
        return actor.remote(node.edge, self._settings)
