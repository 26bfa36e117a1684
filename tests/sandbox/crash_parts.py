"""A server and a client as processes that tests kill."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines import bwrap, gvisor, pool, process, qemu_microvm, qemu_vm, runc, wasm  # noqa: F401  for the forkserver
from abyssal.sandbox.engines.registry import installed
from abyssal.sandbox.errors import AgentLost, OutcomeUnknown, SandboxLost
from abyssal.sandbox.http import server as _  # noqa: F401
from abyssal.sandbox.http.client import HttpService
from abyssal.sandbox.http.run import serve, unix_socket
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.sandbox import Sandbox

SOCKET = "edge.sock"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.sandbox.crash_parts"])


def server(home: Path, engine: str = "process", grace: float | None = None, state: Path | None = None) -> None:
    async def work() -> None:
        engines = installed(state or home / "engines", allow_unsafe=True, names=[engine])
        edge = await Edge.open(home, engines, grace=grace)
        await serve(edge, unix_socket(home / SOCKET))

    asyncio.run(work())


class Host:
    """An edge as a process that is killed and begun again, on a unix socket."""

    def __init__(self, home: Path, engine: str = "process", grace: float | None = None):
        self.home, self._arguments = home, (home, engine, grace)
        self._process: BaseProcess | None = None

    def begin(self) -> None:
        self._process = CONTEXT.Process(target=server, args=self._arguments)
        self._process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self._process is not None and self._process.pid is not None
        os.kill(self._process.pid, number)
        self._process.join(30)
        assert self._process.exitcode is not None

    def connect(self) -> Sandboxes:
        """To be entered; it waits for the edge, and again after each end of it."""
        return Sandboxes(None, opener=self._open)

    async def _open(self) -> HttpService:
        return HttpService("http://edge", socket=self.home / SOCKET, reconnect=60)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.is_alive():
            self.kill(signal.SIGTERM)


def client(home: Path, program: Sequence[str], out: Path) -> None:
    """Does a program from its first step on, as a client does that remembers nothing, and notes each reply."""

    async def work() -> None:
        service = HttpService("http://edge", socket=home / SOCKET, reconnect=60)
        hub = Sandboxes(service)
        sb = await hub.create("container", op_id="the-one", ttl=600)
        with open(out, "a", encoding="ascii") as notes:
            for step, op in enumerate(program):
                try:
                    told = await perform(sb, step, op)
                except OutcomeUnknown as error:
                    await sb.resolve(error.op_id, state="done", exit_code=0)
                    told = "unknown"
                except (AgentLost, SandboxLost):
                    told = "lost"
                notes.write(json.dumps([step, told]) + "\n")
                notes.flush()
        await service.close()

    asyncio.run(work())


async def perform(sb: Sandbox, step: int, op: str) -> Any:
    """One step; what it tells must be the same whenever it is told."""
    match op:
        case "append":
            told: Any = (await sb.run(f"echo {step} >> f; wc -l < f")).text
        case "slow":
            told = (await sb.run(f"sleep 0.03; echo {step} >> f; sleep 0.03; wc -l < f")).text
        case "two":  # at once, in the order of their places
            first, second = await asyncio.gather(
                sb.run(f"echo {step} >> f; wc -l < f"), sb.run(f"echo {step} >> g; echo g")
            )
            told = first.text and second.text and first.text + second.text
        case "write":
            await sb.files.write(f"w{step}", str(step).encode() * 3000)
            told = "written"
        case "read":
            told = (await sb.run("cat f 2> /dev/null; echo read")).text
        case other:
            told = [entry.path for entry in await sb.files.list(other)]
    return told if told != "" else "unknown"  # a declared result is empty
