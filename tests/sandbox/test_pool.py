"""Functions: one worker a call, nothing left behind."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from abyssal.sandbox.api import Box, Command, Spec
from abyssal.sandbox.conformance.bench import SMALL, python, run
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.engines.pool import WARM, PoolBox, PoolEngine
from abyssal.sandbox.engines.runc import RuncEngine
from abyssal.sandbox.errors import SandboxError, Unsupported
from tests.sandbox.traces import traces

Kind = type[RuncEngine] | type[BwrapEngine]


def with_box(state: Path, work: Callable[[Box], Awaitable[None]], inner: Kind = BwrapEngine) -> None:
    async def whole() -> None:
        engine = PoolEngine(state, inner(state))
        probe = await engine.probe()
        if not probe.ok:
            pytest.skip(f"{probe.detail} ({probe.remedy})")
        folder = state / "box"
        folder.mkdir()
        box_id = f"function-{uuid.uuid4().hex[:12]}"
        box = await engine.create(box_id, Spec("function", limits=SMALL), folder)
        try:
            await work(box)
        finally:
            await box.stop()
        assert traces(box_id) == []

    asyncio.run(whole())


@pytest.mark.parametrize("inner", [RuncEngine, BwrapEngine])
def test_calls_answer_and_fail(state: Path, inner: Kind) -> None:
    async def work(box: Box) -> None:
        assert (await run(box, python("import sys; print(sys.argv[1:])", "a", "b"))).stdout == "['a', 'b']\n"
        assert (await run(box, ("call", "math:hypot", "[3, 4]"))).stdout == "5.0\n"
        failed = await run(box, python("raise ValueError('bad')"))
        assert failed.code == 1 and "ValueError: bad" in failed.stderr
        assert (await run(box, python("raise SystemExit(4)"))).code == 4
        ended = await run(box, python("while True: pass"), timeout=0.5)
        assert ended.exit.timed_out and ended.exit.signal == 9

    with_box(state, work, inner)


def test_a_call_ends_as_python_does(state: Path) -> None:
    source = """
import atexit, threading, time
def late():
    time.sleep(0.1)
    print("thread", flush=True)
atexit.register(lambda: print("at exit", flush=True))
threading.Thread(target=late).start()
left = open("/dev/stdout", "w")
left.write("left open\\n")
print("call", flush=True)
"""

    async def work(box: Box) -> None:
        ended = await run(box, python(source))
        assert (ended.code, ended.stderr) == (0, "")
        assert ended.stdout.split("\n") == ["call", "thread", "at exit", "left open", ""]

    with_box(state, work)


def test_nothing_is_left_for_the_next_call(state: Path) -> None:
    leave = """
import os, multiprocessing.shared_memory as m
m.SharedMemory("left", True, 100)
for folder in ("/tmp", "/work", "/dev/shm", "/var/tmp", os.path.expanduser("~")):
    open(folder + "/left", "w").close()
if os.fork() == 0:
    os.setsid()
    import time; time.sleep(60)
"""
    look = """
import os
found = [f + "/" + n for f in ("/tmp", "/work", "/dev/shm", "/var/tmp", os.path.expanduser("~")) for n in os.listdir(f)]
print(found, sum(name.isdigit() for name in os.listdir("/proc")))
"""

    async def work(box: Box) -> None:
        clean = (await run(box, python(look))).stdout
        assert clean.startswith("[] ")
        for _ in range(3):
            await run(box, python(leave))
            assert (await run(box, python(look))).stdout == clean

    with_box(state, work)


def test_more_calls_at_once_than_workers(state: Path) -> None:
    async def work(box: Box) -> None:
        gate = asyncio.Semaphore(5)

        async def call(number: int) -> str:
            async with gate:
                return (await run(box, python(f"print({number})"))).stdout

        outcomes = await asyncio.gather(*map(call, range(15)))
        assert outcomes == [f"{n}\n" for n in range(15)]
        assert isinstance(box, PoolBox)
        assert box._count <= 15 + WARM, "no worker that nobody has asked for"

    with_box(state, work)


def test_what_functions_lack_is_said(state: Path) -> None:
    async def work(box: Box) -> None:
        for command in (Command(("ls",)), Command(("python3", "-c", "1"), tty=(24, 80)), Command(("call", "math"))):
            with pytest.raises(SandboxError):
                await box.start(command)
        with pytest.raises(Unsupported):
            await box.files.read("x")
        with pytest.raises(Unsupported):
            await box.pause()

    with_box(state, work)
