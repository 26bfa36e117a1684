"""What leads out of one sandbox: its policy, the port inside that is its proxy, and the connections of this policy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from abyssal.sandbox.agent import Agent
from abyssal.sandbox.api import Denied, Duplex, Network, Resolver
from abyssal.sandbox.network import streams
from abyssal.sandbox.network.policy import check_policy
from abyssal.sandbox.network.proxy import Proxy, system_resolver
from abyssal.sandbox.network.streams import Listener, Stream

logger = logging.getLogger("abyssal.sandbox")
PORT = 3128  # unless a program has it
NEAR = "127.0.0.1,localhost,::1"
FREE_DENIALS = 200  # that are told at once; then a sandbox waits for each, so that it cannot fill the log
DENIAL_S = 0.1


class Egress:
    """The network of a sandbox whose guest agent answers.

    Args:
        agent: greeted already.
        own: environment that its creator gave.
    Attributes:
        network: the policy that holds.
        resolve: names to addresses.
        denied: told of each refused connection.
    """

    def __init__(self, agent: Agent, own: Mapping[str, str]):
        self._agent, self._own = agent, own
        self.resolve: Resolver = system_resolver
        self.network = Network()
        self._listener: Listener | None = None
        self._count = 0
        self._turn = asyncio.Lock()
        self._change = asyncio.Lock()
        self.denied: Callable[[Denied], None] = _log

    async def set(self, network: Network) -> None:
        """Another policy instead of the one that holds; connections that are open end.

        Raises:
            BadRequest, Unsupported: it cannot be enforced; the old one holds on.
            AgentLost: the sandbox is gone.
        """
        check_policy(network)
        async with self._change:
            if network.mode != "none" and self._listener is None:
                self._listener = await Listener.open(self._agent, PORT)
                self._listener.serve(self._carry)
            self.network = network
            if self._listener is not None:
                await self._listener.end_connections()

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """A command's environment: with the proxy, where there is a network and nobody has said otherwise."""
        if self.network.mode == "none" or self._listener is None:
            return dict(given)
        proxy = f"http://127.0.0.1:{self._listener.port}"
        settings = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy, "NO_PROXY": NEAR}
        said = {name.upper() for name in (*self._own, *given)}
        ours = {name: value for name, value in settings.items() if name not in said}
        return {**ours, **{name.lower(): value for name, value in ours.items()}, **given}

    async def dial(self, port: int) -> Duplex:
        """A connection to a port inside.

        Raises:
            NotFound: nobody listens there.
            AgentLost: the sandbox is gone.
        """
        return await streams.connect(self._agent, port)

    async def close(self) -> None:
        """End all connections that lead out."""
        if self._listener is not None:
            await self._listener.close()

    async def _carry(self, stream: Stream) -> None:
        await Proxy(stream, self.network, self.resolve, self._deny).run()

    async def _deny(self, denied: Denied) -> None:
        self._count += 1
        self.denied(denied)
        if self._count > FREE_DENIALS:
            async with self._turn:
                await asyncio.sleep(DENIAL_S)


class OverAgent:
    """The network of a box as `Networked` and `Box` want it, over the `Egress` that the box makes of its agent."""

    _egress: Egress

    async def set_network(self, network: Network) -> None:
        await self._egress.set(network)

    async def dial(self, port: int) -> Duplex:
        return await self._egress.dial(port)

    def resolve_with(self, resolve: Resolver) -> None:
        self._egress.resolve = resolve

    def tell_denied(self, told: Callable[[Denied], None]) -> None:
        self._egress.denied = told


def _log(denied: Denied) -> None:
    logger.warning("a connection was denied", extra={"host": denied.host, "port": denied.port, "why": denied.reason})
