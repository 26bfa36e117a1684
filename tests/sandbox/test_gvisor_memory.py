"""Memory of gVisor's containers: copies that go on, snapshots that do, and what cannot be kept."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from abyssal.sandbox.api import Box, Command, Limits, Network, Process, Spec, Stdout, shell
from abyssal.sandbox.conformance.bench import run
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.gvisor import FEATURES, FORGETFUL, RUN, TRIED, GvisorEngine
from abyssal.sandbox.engines.gvisor_box import CHECKPOINT, FILE
from abyssal.sandbox.errors import ImageError, SandboxError, Unsupported
from abyssal.sandbox.guest import build
from abyssal.sandbox.hub import Sandboxes

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="gVisor's containers need root"),
    pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed: apt-get install runsc"),
    pytest.mark.skipif(shutil.which("cc") is None, reason=build.REMEDY),
]
# its number is nowhere but in its memory
COUNT = "i=0; while :; do i=$((i+1)); echo $i; echo $i > new; mv new count; sleep 0.02; done"
SPEC = Spec("container")


@asynccontextmanager
async def a_box(state: Path, name: str = "original") -> AsyncIterator[tuple[GvisorEngine, Box]]:
    engine = GvisorEngine(state)
    folder = state.parent / f"{state.parent.name[-12:].strip('_')}-{name}"
    folder.mkdir()
    box = await engine.create(folder.name, SPEC, folder)
    try:
        if "memory-snapshot" not in box.features:
            pytest.skip(f"runsc keeps no memory here: {(RUN / TRIED).read_text()}")
        yield engine, box
    finally:
        await box.stop()
        assert not list((RUN / "gvisor").glob(f"{folder.name}*")), "a name of the runtime is left"
        assert not (RUN / folder.name).exists()


class Reader:
    """Lines that a process has written so far."""

    def __init__(self, process: Process):
        self._text = b""
        self._task = asyncio.create_task(self._read(process))

    async def _read(self, process: Process) -> None:
        with suppress(SandboxError):
            async for event in process.events():
                if isinstance(event, Stdout):
                    self._text += event.data

    @property
    def numbers(self) -> list[int]:
        return [int(line) for line in self._text.split(b"\n")[:-1]]

    async def more(self) -> None:
        before = len(self.numbers)
        async with asyncio.timeout(10):
            while len(self.numbers) < before + 3:
                await asyncio.sleep(0.02)


async def counted(box: Box) -> tuple[int, int]:
    """The number in a box's file, and a later one."""
    first = int(await box.files.read("count"))
    async with asyncio.timeout(10):
        while (later := int(await box.files.read("count"))) == first:
            await asyncio.sleep(0.05)
    return first, later


def beside(box: Box, state: Path, name: str) -> Path:
    folder = state.parent / f"{box.id}-{name}"
    folder.mkdir()
    return folder


def test_a_copy_goes_on_and_so_does_the_original(state: Path) -> None:
    async def scene() -> None:
        async with a_box(state) as (_, box):
            reader = Reader(await box.start(Command(shell(COUNT), timeout=60)))
            await reader.more()
            (copy,) = await box.fork([f"{box.id}-copy"])
            try:
                stood = int(await copy.files.read("count"))
                assert (await counted(copy))[1] > stood > 1, "its program counts on, from where it was"
                await reader.more()
                assert reader.numbers == list(range(1, len(reader.numbers) + 1)), "not a line is lost or doubled"
                identities = {(await run(each, "cat /etc/machine-id")).stdout for each in (box, copy)}
                draws = {(await run(each, "head -c 16 /dev/urandom | od -An -tx1")).stdout for each in (box, copy)}
                assert len(identities) == len(draws) == 2
            finally:
                await copy.stop()

    asyncio.run(scene())


@pytest.mark.boxes
def test_twenty_in_a_row(state: Path) -> None:
    async def scene() -> None:
        async with a_box(state) as (_, box):
            reader = Reader(await box.start(Command(shell(COUNT), timeout=600)))
            await reader.more()
            for number in range(20):
                (copy,) = await box.fork([f"{box.id}-{number}"])
                await counted(copy)
                await reader.more()
                await copy.stop()
            assert reader.numbers == list(range(1, len(reader.numbers) + 1))

    asyncio.run(scene())


@pytest.mark.boxes
def test_a_snapshot_goes_on_when_the_original_is_gone(state: Path) -> None:
    async def scene() -> None:
        kept = state.parent / "kept"
        async with a_box(state) as (engine, box):
            reader = Reader(await box.start(Command(shell(COUNT), timeout=60)))
            await reader.more()
            assert {*await box.snapshot(kept, memory=True)} == {"layer", "memory"}
            await reader.more()
            other = replace(SPEC, limits=Limits(memory=SPEC.limits.memory * 2))
            with pytest.raises(Unsupported, match="goes on under what it began with"):
                await engine.restore(f"{box.id}-x", other, beside(box, state, "x"), kept)
        for name in ("a", "b"):
            twin = await engine.restore(f"{box.id}-{name}", SPEC, beside(box, state, name), kept)
            first, later = await counted(twin)
            assert later > first
            (child,) = await twin.fork([f"{twin.id}-child"])
            assert (await counted(child))[0] >= first
            await child.stop()
            await twin.stop()
        for file in (FILE, CHECKPOINT):
            whole = (kept / file).read_bytes()
            (kept / file).write_bytes(whole[: len(whole) // 2])
            with pytest.raises(ImageError):
                await engine.restore(f"{box.id}-{file[:3]}", SPEC, beside(box, state, file[:3]), kept)
            assert not list((RUN / "gvisor").glob(f"{box.id}*"))
            (kept / file).write_bytes(whole)

    asyncio.run(scene())


@pytest.mark.boxes
def test_a_deleted_file_that_is_open_is_refused_and_nothing_ends(state: Path) -> None:
    async def scene() -> None:
        async with a_box(state) as (_, box):
            holder = await box.start(Command(shell("exec 3> gone; rm gone; touch ready; sleep 600"), timeout=600))
            async with asyncio.timeout(10):
                while (await run(box, "test -e ready")).code:
                    await asyncio.sleep(0.05)
            with pytest.raises(Unsupported, match="/work/gone"):
                await box.fork([f"{box.id}-copy"])
            assert (await run(box, "echo here")).stdout == "here\n"
            await holder.signal(9)
            (copy,) = await box.fork([f"{box.id}-copy"])
            await copy.stop()

    asyncio.run(scene())


@pytest.mark.boxes
def test_a_paused_box_stays_so(state: Path) -> None:
    async def scene() -> None:
        async with a_box(state) as (_, box):
            reader = Reader(await box.start(Command(shell(COUNT), timeout=60)))
            await reader.more()
            await box.pause()
            (copy,) = await box.fork([f"{box.id}-copy"])
            await counted(copy)
            await copy.stop()
            await asyncio.sleep(0.2)
            stood = len(reader.numbers)
            await asyncio.sleep(0.5)
            assert len(reader.numbers) == stood
            await box.resume()
            await reader.more()

    asyncio.run(scene())


@pytest.mark.boxes
def test_connections_inside_go_on_and_those_outside_end(state: Path) -> None:
    talk = (
        "import socket, time\n"
        "s = socket.create_server(('127.0.0.1', 7001)); c = socket.create_connection(('127.0.0.1', 7001))\n"
        "a, _ = s.accept(); n = 0\n"
        "while True:\n"
        " c.send(b'x'); assert a.recv(1) == b'x'; n += 1; open('new', 'w').write(str(n))\n"
        " import os; os.rename('new', 'count'); time.sleep(0.02)\n"
    )

    async def scene() -> None:
        async with a_box(state) as (_, box):
            await box.set_network(Network("allow"))
            await box.start(Command(("python3", "-c", talk), timeout=60))
            async with asyncio.timeout(20):
                while (await run(box, "test -e count")).code:
                    await asyncio.sleep(0.05)
            (copy,) = await box.fork([f"{box.id}-copy"])
            try:
                for each in (box, copy):
                    await counted(each)
                    assert "HTTP_PROXY=http://127.0.0.1:" in (await run(each, "env")).stdout
            finally:
                await copy.stop()

    asyncio.run(scene())


@pytest.mark.boxes
def test_through_an_edge(home: Path) -> None:
    async def scene() -> None:
        edge = await Edge.open(home, [GvisorEngine(home / "engines")])
        try:
            async with Sandboxes(edge) as hub:
                box = await hub.create("container")
                await box.start(["sh", "-c", COUNT])
                await asyncio.sleep(1)
                snapshot = await box.snapshot(memory=True)
                for each in (*await box.fork(2), await hub.create("container", snapshot=snapshot)):
                    read = [int((await each.run("cat count; sleep 1")).text) for _ in range(2)]
                    assert read[1] > read[0]
        finally:
            await edge.close()

    asyncio.run(scene())


@pytest.mark.boxes
def test_a_release_that_cannot_says_so(state: Path) -> None:
    """In front of the real one, a program that refuses to write checkpoints."""
    cannot = state.parent / "runsc"
    cannot.write_text(
        '#!/bin/sh\nfor each in "$@"; do [ "$each" = checkpoint ] && { echo no checkpoints >&2; exit 1; }; done\n'
        f'exec {shutil.which("runsc")} "$@"\n'
    )
    cannot.chmod(0o755)

    class Forgetful(GvisorEngine):
        program = str(cannot)

    async def scene() -> None:
        engine = Forgetful(state)
        probe = await engine.probe()
        assert probe.ok and "no checkpoints" in probe.detail
        assert probe.placed is not None and FORGETFUL in probe.placed.degraded
        folder = state.parent / "forgetful"
        folder.mkdir()
        box = await engine.create("forgetful", SPEC, folder)
        try:
            assert Forgetful(state).features == engine.features == FEATURES - {"memory-snapshot"}, "known to the next"
            assert box.placed == probe.placed and "memory-snapshot" not in box.features
            with pytest.raises(Unsupported, match="keeps no memory"):
                await box.snapshot(state.parent / "kept", memory=True)
            await box.files.write("note", b"here")
            (copy,) = await box.fork(["forgetful-copy"])
            assert await copy.files.read("note") == b"here"
            await copy.stop()
        finally:
            await box.stop()

    asyncio.run(scene())
