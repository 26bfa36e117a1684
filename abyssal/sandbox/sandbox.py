"""A sandbox as its user sees it (sandbox.md 4); made by `hub`."""

from __future__ import annotations

import secrets as random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from abyssal.sandbox import shapes
from abyssal.sandbox.api import Boundary, Network, Placed, ProcessEvent, shell
from abyssal.sandbox.errors import Divergence, Unsupported
from abyssal.sandbox.handles import Result, Running, SandboxFiles, Session, Terminal, result
from abyssal.sandbox.network.ports import Forward
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.service import Answer, Begun, Service

OnDivergence = Literal["raise", "fork"]


@dataclass(frozen=True)
class Snapshot:
    """A snapshot: its id, for `create(snapshot=...)`, and digests of what it holds."""

    id: str
    digests: Mapping[str, str]


class Hub(Protocol):
    """What a sandbox needs of the hub that made it."""

    @property
    def service(self) -> Service: ...

    def adopt(self, sandbox: Sandbox) -> None: ...

    def release(self, sandbox: Sandbox) -> None: ...

    def hold(self, forward: Forward) -> None: ...


class Sandbox:
    """A sandbox; made by `Sandboxes`.

    Attributes:
        id: of the sandbox.
        placed: what runs it, how strong its boundary is, what is missing.
        files: files inside.
        stream: under which its operations are counted, or None.
    """

    def __init__(self, hub: Hub, info: Mapping[str, Any], stream: str | None, on_divergence: OnDivergence):
        self._hub = hub
        self.id: str = info["id"]
        self.placed: Placed | None = None if info["placed"] is None else shapes.placed(info["placed"])
        self.stream_name, self._on_divergence = stream, on_divergence
        self.rollout: Mapping[str, Any] | None = None
        self.files = SandboxFiles(self)
        self._forwards: list[Forward] = []
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

    async def port(self, port: int, *, local: int = 0) -> Forward:
        """A port of this machine, on 127.0.0.1, whose connections lead to a port inside, on its loopback.

        It is open until the sandbox is stopped or the hub is left; whoever is on this machine can connect to it.

        Args:
            port: inside; a program there may begin to listen later.
            local: of this machine; 0 for one that is free.
        Raises:
            Unsupported: the engine has no ports.
            OSError: the local one is taken.
        """
        info = await self.info()
        if "ports" not in info.get("features", ("ports",)):  # of one that has ended, nobody says it
            raise Unsupported(f"engine {info['engine']} has no ports: choose substrate container, microvm or vm")
        forward = await Forward.open(lambda: self.service.dial(self.id, port), local)
        self._forwards.append(forward)
        self._hub.hold(forward)
        return forward

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
        for forward in self._forwards:
            await forward.close()
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
