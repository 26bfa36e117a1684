"""The SDK: sandboxes of this host, of an edge in this process or over HTTP, in the same words (sandbox.md 4)."""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from abyssal.sandbox import shapes
from abyssal.sandbox.api import (
    Limits,
    Network,
    Require,
    Spec,
    Substrate,
)
from abyssal.sandbox.errors import NotFound, SandboxError, Unsupported
from abyssal.sandbox.network.ports import Forward
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.sandbox import OnDivergence, Sandbox, Snapshot
from abyssal.sandbox.service import Service, Wanted


class Sandboxes:
    """A hub of sandboxes, as a context manager; leaving it stops what was created in it and not detached.

    Args:
        service: an edge in this process; it is left open. Use `connect` for others.
    """

    def __init__(self, service: Service | None, *, opener: Callable[[], Awaitable[Service]] | None = None):
        self._service, self._opener = service, opener
        self._created: dict[str, Sandbox] = {}
        self._forwards: list[Forward] = []

    @classmethod
    def connect(cls, where: str = "local", *, token: str | None = None, home: Path | None = None) -> Self:
        """A hub to enter.

        Args:
            where: "local" for the edge of this host, which is started if none runs, an address as http://host:port, or
                a Ray cluster as ray://auto, whose nodes then have an edge each.
            token: for an address.
            home: folder of the local edge; default below the platform's cache folder.
        """

        async def opener() -> Service:
            from abyssal.sandbox.http.client import HttpService
            from abyssal.sandbox.http.daemon import local

            if where.startswith("ray://"):
                return await _ray(where)
            return await local(home) if where == "local" else await HttpService.open(where, token)

        return cls(None, opener=opener)

    @property
    def service(self) -> Service:
        """What it speaks to.

        Raises:
            SandboxError: it was not entered.
        """
        if self._service is None:
            raise SandboxError("the hub is not connected: use it as `async with Sandboxes.connect(...) as hub`")
        return self._service

    async def __aenter__(self) -> Self:
        if self._opener is not None:
            self._service = await self._opener()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for sandbox in list(self._created.values()):
                try:
                    await sandbox.stop()
                except NotFound:
                    continue
                except SandboxError:
                    if error is None:
                        raise
        finally:
            for forward in self._forwards:
                await forward.close()
            self._forwards.clear()
            if self._opener is not None:
                await self.service.close()
                self._service = None

    async def create(
        self,
        substrate: Substrate,
        *,
        image: str = "host",
        limits: Limits | Mapping[str, Any] | None = None,
        network: Network | None = None,
        require: Require | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/work",
        user: str = "user",
        labels: Mapping[str, str] | None = None,
        ttl: float = 900.0,
        idle_ttl: float | None = None,
        engine: str | None = None,
        snapshot: Snapshot | str | None = None,
        secrets: Mapping[str, str] | None = None,
        op_id: str | None = None,
        stream: str = "main",
        on_divergence: OnDivergence = "raise",
    ) -> Sandbox:
        """Create a sandbox; another substrate is another first word and nothing else.

        Args:
            substrate, image, network, require, env, cwd, user, labels, ttl, idle_ttl: see `Spec`.
            limits: see `Limits`; as a mapping, sizes may be texts such as "512M".
            engine: insist on this one.
            snapshot: to start from.
            secrets: names and values that the log must not hold.
            op_id: a name for the creation: asked twice, the same sandbox is given.
            stream: under which this client counts its operations.
            on_divergence: what to do when a client that came back asks for something else: "fork" goes on in a new
                sandbox from the last common operation.
        Raises:
            Unsupported: no engine of the host meets it.
            Rejected: no room now.
            QuotaExceeded: the job has all it may have.
            ImageError: the image or snapshot is missing or damaged.
        """
        given = limits if isinstance(limits, Limits) else shapes.limits(limits or {})
        spec = Spec(
            substrate, image=image, limits=given, network=network or Network(), require=require or Require(),
            env=dict(env or {}), cwd=cwd, user=user, labels=dict(labels or {}), ttl=ttl, idle_ttl=idle_ttl,
        )  # fmt: skip
        chosen = snapshot.id if isinstance(snapshot, Snapshot) else snapshot
        wanted = Wanted(spec, engine, chosen, dict(secrets or {}))
        info = await self.service.create(wanted, Asked(op_id=op_id))
        sandbox = Sandbox(self, info, stream, on_divergence)
        self._created[sandbox.id] = sandbox
        return sandbox

    async def attach(
        self, sandbox: str, *, stream: str | None = None, on_divergence: OnDivergence = "raise"
    ) -> Sandbox:
        """A sandbox that is there; leaving the hub does not stop it.

        Args:
            sandbox: its id.
            stream: the stream of a client that comes back and asks again from its first operation on: what was done is
                answered from the log. None begins anew: everything asked for runs.
            on_divergence: as for `create`.
        Raises:
            NotFound, Expired: it is not there.
        """
        return Sandbox(self, await self.service.info(sandbox), stream, on_divergence)

    async def list(self, **labels: str) -> Sequence[Mapping[str, Any]]:
        """Sandboxes that have all these labels."""
        return await self.service.list(labels)

    async def capabilities(self) -> Mapping[str, Any]:
        """Engines of the host, what their probes found, and what room there is."""
        return await self.service.capabilities()

    async def pause(self, label: str, value: str) -> Sequence[str]:
        """Pause all sandboxes with a label, as when a job is preempted; returns their ids."""
        return await self.service.group(label, value, "pause")

    async def resume(self, label: str, value: str) -> Sequence[str]:
        """Let them go on."""
        return await self.service.group(label, value, "resume")

    async def stop(self, label: str, value: str) -> Sequence[str]:
        """End them."""
        return await self.service.group(label, value, "stop")

    def adopt(self, sandbox: Sandbox) -> None:
        """Stop it when the hub is left."""
        self._created[sandbox.id] = sandbox

    def hold(self, forward: Forward) -> None:
        """Close it when the hub is left, unless it was closed before."""
        self._forwards = [each for each in self._forwards if not each.closed] + [forward]

    def release(self, sandbox: Sandbox) -> None:
        """Do not."""
        self._created.pop(sandbox.id, None)


async def _ray(where: str) -> Service:
    if importlib.util.find_spec("ray") is None:
        raise Unsupported(f"{where} needs Ray, which is not installed: pip install 'abyssal[dist]'")
    from abyssal.sandbox.scale.service import RayService

    return await RayService.open(where)
