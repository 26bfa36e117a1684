"""A server and a client as processes that tests kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.process import ProcessEngine
from abyssal.sandbox.errors import OutcomeUnknown
from abyssal.sandbox.http.client import HttpService
from abyssal.sandbox.http.run import serve, unix_socket
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.sandbox import Sandbox

SOCKET = "edge.sock"


def server(home: Path) -> None:
    async def work() -> None:
        edge = await Edge.open(home, [ProcessEngine(allow_unsafe=True)])
        await serve(edge, unix_socket(home / SOCKET))

    asyncio.run(work())


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
