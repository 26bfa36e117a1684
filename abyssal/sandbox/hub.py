"""The SDK: sandboxes of this host, of an edge in this process or over HTTP, in the same words (sandbox.md 4)."""

from __future__ import annotations

import secrets as random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from abyssal.sandbox import shapes
from abyssal.sandbox.api import (
    Boundary,
    Limits,
    Network,
    Placed,
    ProcessEvent,
    Require,
    Spec,
    Substrate,
    shell,
)
from abyssal.sandbox.errors import Divergence, NotFound, SandboxError
from abyssal.sandbox.handles import Result, Running, SandboxFiles, Session, Terminal, result
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.service import Answer, Begun, Service, Wanted

OnDivergence = Literal["raise", "fork"]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot: its id, for `create(snapshot=...)`, and digests of what it holds."""

    id: str
    digests: Mapping[str, str]


class Sandboxes:
    """A hub of sandboxes, as a context manager; leaving it stops what was created in it and not detached.

    Args:
        service: an edge in this process; it is left open. Use `connect` for others.
    """

    def __init__(self, service: Service | None, *, opener: Callable[[], Awaitable[Service]] | None = None):
        self._service, self._opener = service, opener
        self._created: dict[str, Sandbox] = {}

    @classmethod
    def connect(cls, where: str = "local", *, token: str | None = None, home: Path | None = None) -> Self:
        """A hub to enter.

        Args:
            where: "local" for the edge of this host, which is started if none runs, or an address as http://host:port.
            token: for an address.
            home: folder of the local edge; default below the platform's cache folder.
        """

        async def opener() -> Service:
            from abyssal.sandbox.http.client import HttpService
            from abyssal.sandbox.http.daemon import local

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
        info = await self.service.create(wanted, Asked(op_id=op_id or f"create-{random.token_hex(16)}"))
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

    def release(self, sandbox: Sandbox) -> None:
        """Do not."""
        self._created.pop(sandbox.id, None)


class Sandbox:
    """A sandbox; made by `Sandboxes`.

    Attributes:
        id: of the sandbox.
        placed: what runs it, how strong its boundary is, what is missing.
        files: files inside.
        stream: under which its operations are counted, or None.
    """

    def __init__(self, hub: Sandboxes, info: Mapping[str, Any], stream: str | None, on_divergence: OnDivergence):
        self._hub = hub
        self.id: str = info["id"]
        self.placed: Placed | None = None if info["placed"] is None else shapes.placed(info["placed"])
        self.stream_name, self._on_divergence = stream, on_divergence
        self.rollout: Mapping[str, Any] | None = None
        self.files = SandboxFiles(self)
        self._ordinal = 0
        self._sessions = 0

    @property
    def service(self) -> Service:
        """What it speaks to."""
        return self._hub.service

    @property
    def boundary(self) -> Boundary:
        """What holds it in."""
        return "process" if self.placed is None else self.placed.boundary

    def asked(self, op_id: str | None = None) -> Asked:
        """The next operation of this client: its place is taken at once, before anything is waited for."""
        if op_id is not None or self.stream_name is None:
            return Asked(op_id=op_id or f"op-{random.token_hex(8)}", rollout=self.rollout)
        ordinal, self._ordinal = self._ordinal, self._ordinal + 1
        return Asked(stream=self.stream_name, ordinal=ordinal, rollout=self.rollout)

    async def call(self, req: dict[str, Any], *, op_id: str | None = None, data: bytes | None = None) -> Answer:
        """One operation, to its end; see `perform`."""
        asked = self.asked(op_id)
        try:
            return await self.service.call(self.id, req, asked, data)
        except Divergence as error:
            await self._diverge(error, asked)
            return await self.service.call(self.id, req, asked, data)

    async def _begin(self, req: dict[str, Any], op_id: str | None, data: bytes | None) -> Begun:
        asked = self.asked(op_id)
        try:
            return await self.service.begin(self.id, req, asked, data)
        except Divergence as error:
            await self._diverge(error, asked)
            return await self.service.begin(self.id, req, asked, data)

    async def _diverge(self, error: Divergence, asked: Asked) -> None:
        """Go on in a new sandbox that has all that came before the place, or raise."""
        if self._on_divergence != "fork":
            raise error
        from abyssal.sandbox.replay import branch

        child = await branch(self.service, self.id, error.seq, keep_places=True)
        self.id = child
        self._hub.adopt(self)

    async def run(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: bytes | None = None,
        timeout: float | None = None,
        keep: bool = False,
        op_id: str | None = None,
    ) -> Result:
        """Run a command to its end.

        Args:
            command: a text for the shell, or program and arguments.
            cwd, env, user, timeout, keep: see `Command`.
            stdin: what it reads.
            op_id: a name: asked twice, it runs once.
        Raises:
            LimitHit: a limit ended it.
            AgentLost: the sandbox ended first.
            NotFound: no such program or folder.
            OutcomeUnknown: it was begun before, and how it ended was never learnt.
            Divergence: another operation stands in its place.
        """
        req = _exec(command, cwd=cwd, env=env, user=user, timeout=timeout, keep=keep)
        return result(await self.call(req, op_id=op_id, data=stdin), self.boundary)

    async def start(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        keep: bool = False,
        op_id: str | None = None,
    ) -> Running:
        """Begin a command and do not wait; arguments as for `run`, `stdin` says whether `Running.write` is used."""
        req = _exec(command, cwd=cwd, env=env, user=user, timeout=timeout, keep=keep)
        if stdin:
            req["stdin"] = True
        return Running(self, await self._begin(req, op_id, None))

    async def stream(self, command: str | Sequence[str], **options: Any) -> AsyncIterator[ProcessEvent]:
        """Run a command and give its output as it comes; arguments as for `start`."""
        running = await self.start(command, **options)
        async for event in running.events():
            yield event

    async def processes(self) -> Sequence[Running]:
        """Commands that run now, whoever began them."""
        return [
            Running(self, Begun(entry["op_id"], entry["seq"], False))
            for entry in await self.service.operations(self.id)
            if entry["state"] == "running" and entry["req"]["op"] == "exec"
        ]

    async def session(self) -> Session:
        """A shell that keeps its folder and exported variables."""
        self._sessions += 1
        name = self.stream_name or random.token_hex(6)
        return Session(self.run, f"{name}-{self._sessions}")

    async def tty(
        self, rows: int = 24, columns: int = 80, command: str | Sequence[str] = ("/bin/sh",), op_id: str | None = None
    ) -> Terminal:
        """A terminal with a program in it, by default a shell.

        Raises:
            Unsupported: the engine has none.
        """
        req = {**_exec(command), "tty": [rows, columns]}
        return Terminal(self, await self._begin(req, op_id, None))

    async def snapshot(self, *, memory: bool = False, op_id: str | None = None) -> Snapshot:
        """Keep its disk, and its memory if asked for.

        Raises:
            Unsupported: the engine cannot.
        """
        res = (await self.call({"op": "snapshot", "memory": memory}, op_id=op_id)).res
        return Snapshot(res["snapshot"], res["digests"])

    async def fork(self, count: int = 1, *, op_id: str | None = None) -> Sequence[Sandbox]:
        """Copies that go on from here; they are stopped when the hub is left.

        Raises:
            Unsupported: the engine cannot.
        """
        res = (await self.call({"op": "fork", "count": count}, op_id=op_id)).res
        children = []
        for child in res["children"]:
            children.append(Sandbox(self._hub, await self.service.info(child), self.stream_name, self._on_divergence))
            self._hub.adopt(children[-1])
        return children

    async def pause(self) -> None:
        """Stop all its processes where they are."""
        await self.call({"op": "pause"})

    async def resume(self) -> None:
        """Let them go on."""
        await self.call({"op": "resume"})

    async def set_network(self, network: Network) -> None:
        """Another policy, as a whole."""
        await self.call({"op": "network", "network": shapes.plain(network)})

    async def set_ttl(self, seconds: float) -> None:
        """It ends this many seconds from now."""
        await self.call({"op": "ttl", "ttl": seconds})

    async def info(self) -> Mapping[str, Any]:
        """What is known of it."""
        return await self.service.info(self.id)

    async def log(self, from_seq: int = 0, *, follow: bool = False) -> AsyncIterator[Mapping[str, Any]]:
        """Its records."""
        async for record in self.service.log(self.id, from_seq, follow=follow):
            yield record

    async def resolve(self, op_id: str, **res: Any) -> None:
        """Declare how an operation of unknown outcome ended: `state="done", exit_code=0`."""
        await self.service.resolve(self.id, op_id, res)

    def detach(self) -> str:
        """Let it live when the hub is left, until its time has passed; returns its id."""
        self._hub.release(self)
        return self.id

    async def stop(self) -> None:
        """End it; its log stays."""
        self._hub.release(self)
        await self.service.destroy(self.id)


def _exec(
    command: str | Sequence[str],
    *,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    timeout: float | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    req: dict[str, Any] = {"op": "exec", "argv": list(shell(command) if isinstance(command, str) else command)}
    given = {"cwd": cwd, "env": dict(env) if env else None, "user": user, "timeout": timeout, "keep": keep or None}
    return req | {name: value for name, value in given.items() if value is not None}
