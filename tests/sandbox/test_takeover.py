"""An edge is killed while real sandboxes live: the next one takes them over, or nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from abyssal.sandbox.api import Allowed, Network
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.errors import Expired, OutcomeUnknown, SandboxLost
from abyssal.sandbox.hub import Sandboxes
from tests.sandbox.crash_parts import Host
from tests.sandbox.test_real_serving import SMALL
from tests.sandbox.traces import traces

SLOW = [pytest.param(name, marks=pytest.mark.boxes) for name in ("runc", "gvisor")]
LINES = "i=0; while [ $i -lt 40000 ]; do echo line $i; i=$((i+1)); done | head -c 300000; sleep 1; echo; echo last"


def held(engine: str, home: Path, work: Callable[[Host, Sandboxes], Awaitable[None]], grace: float = 60) -> None:
    """Run a test at a host that is killed as it likes; skip, with the reason, where the engine does not run."""

    async def whole() -> None:
        async with host.connect() as hub:
            (found,) = (await hub.capabilities())["engines"]
            if not found["ok"]:
                pytest.skip(f"{engine}: {found['detail']} ({found['remedy']})")
            await work(host, hub)

    with Host(home, engine, grace) as host:
        asyncio.run(asyncio.wait_for(whole(), 100))
    until = time.monotonic() + 5
    while keepers(home) and time.monotonic() < until:  # it ends right behind its edge
        time.sleep(0.05)
    assert keepers(home) == []


def keepers(home: Path) -> list[str]:
    """Processes that hold boxes of this edge."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if any(b"sandbox.keeper" in word for word in words) and os.fsencode(home) in words:
            found.append(path.parent.name)
    return found


async def vanish(sandbox: str, home: Path, seconds: float) -> None:
    """Wait until nothing is left of a sandbox but its log, and nobody who held it."""
    until = time.monotonic() + seconds
    while (left := [*traces(sandbox), *keepers(home)]) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    assert left == [] and not (home / "live" / sandbox).exists() and (home / "boxes" / sandbox / "log").exists()


@pytest.mark.parametrize("engine", ["bwrap", *SLOW])
def test_a_client_and_its_commands_go_on(engine: str, home: Path) -> None:
    """Same id, same files, output without a gap, policy and time to live as before; nothing runs twice."""

    async def work(host: Host, hub: Sandboxes) -> None:
        network = Network("allow", (Allowed("example.org"),))
        sb = await hub.create("container", limits=SMALL, labels={"job": "7"}, network=network)
        assert (await sb.run("echo 1 >> runs; echo a > f; touch /tmp/t")).exit_code == 0
        session = await sb.session()
        await session.run("cd /tmp; export A=b")
        short = asyncio.create_task(sb.run("echo 2 >> runs; echo begin; sleep 1; echo err >&2; echo end; exit 3"))
        long = asyncio.create_task(sb.run(f"echo 3 >> runs; {LINES}"))
        limited = asyncio.create_task(sb.run("echo 4 >> runs; sleep 60", timeout=2))
        cat = await sb.start("cat; echo 5 >> runs", stdin=True)
        await cat.write(b"one ")
        await asyncio.sleep(0.4)
        host.kill()
        assert traces(sb.id)
        host.begin()
        result = await short
        assert (result.exit_code, result.stdout, result.stderr) == (3, b"begin\nend\n", b"err\n")
        lines = (await long).stdout
        assert lines.startswith(b"line 0\nline 1\n") and lines.endswith(b"\nlast\n") and len(lines) == 300_006
        assert (await limited).timed_out
        await cat.write(b"two", end=True)
        assert (await cat.wait()).stdout == b"one two"
        assert (await session.run("echo $A; pwd; test -e t && echo t")).text == "b\n/tmp\nt\n"
        assert (await sb.run("cat f; sort runs")).text == "a\n1\n2\n3\n4\n5\n"
        first = await (await hub.attach(sb.id, stream="main")).run("echo 1 >> runs; echo a > f; touch /tmp/t")
        assert first.replayed
        refused = await sb.run("curl -sS -m 5 https://example.com || echo refused; echo $https_proxy")
        assert "refused" in refused.text and "127.0.0.1" in refused.text
        assert [found["id"] for found in await hub.list(job="7")] == [sb.id]
        assert not list((home / "boxes" / sb.id / "log" / "running").iterdir())
        await sb.set_ttl(0.1)
        until = time.monotonic() + 20
        while (await hub.service.info(sb.id))["status"] != "expired" and time.monotonic() < until:
            await asyncio.sleep(0.1)
        with pytest.raises(Expired):
            await sb.run("echo")
        assert traces(sb.id) == []

    held(engine, home, work)


@pytest.mark.parametrize("engine", [pytest.param("bwrap", marks=pytest.mark.boxes), "runc", SLOW[1]])
def test_what_was_paused_stays_paused(engine: str, home: Path) -> None:
    """Also over two ends of the edge; a command in it goes on when it does."""

    async def work(host: Host, hub: Sandboxes) -> None:
        sb = await hub.create("container", limits=SMALL)
        ticks = asyncio.create_task(sb.run("for i in 1 2 3 4 5 6; do echo $i >> ticks; sleep 0.2; done; cat ticks"))
        await asyncio.sleep(0.5)
        await sb.pause()
        for _ in range(2):
            host.kill()
            host.begin()
            assert (await hub.service.info(sb.id))["status"] == "paused"
        await asyncio.sleep(1)
        assert not ticks.done()
        await sb.resume()
        assert (await ticks).text == "1\n2\n3\n4\n5\n6\n"
        await sb.files.write("g", b"g")
        assert await sb.files.read("g") == b"g"

    held(engine, home, work)


@pytest.mark.parametrize("engine", ["bwrap", *SLOW])
def test_nothing_is_left_that_no_edge_takes_over(engine: str, home: Path) -> None:
    async def work(host: Host, hub: Sandboxes) -> None:
        sb = await hub.create("container", limits=SMALL)
        running = asyncio.create_task(sb.run("setsid sleep 600 & sleep 600"))
        await asyncio.sleep(0.3)
        host.kill()
        assert traces(sb.id)
        await vanish(sb.id, home, 15)
        host.begin()
        with pytest.raises(OutcomeUnknown):
            await running
        with pytest.raises(SandboxLost):
            await sb.run("echo")

    held(engine, home, work, grace=1)


@pytest.mark.boxes
@pytest.mark.parametrize("engine", ["bwrap", "runc"])
def test_time_to_live_ends_without_an_edge(engine: str, home: Path) -> None:
    async def work(host: Host, hub: Sandboxes) -> None:
        sb, other = await hub.create("container", limits=SMALL, ttl=3), await hub.create("container", limits=SMALL)
        host.kill()
        await asyncio.sleep(3)
        until = time.monotonic() + 10
        while traces(sb.id) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        assert traces(sb.id) == [] and traces(other.id)
        host.begin()
        assert (await other.run("echo there")).text == "there\n"
        with pytest.raises(Expired):
            await asyncio.sleep(1)
            await sb.run("echo")

    held(engine, home, work)


@pytest.mark.boxes
@pytest.mark.parametrize("engine", ["bwrap", "runc"])
def test_a_keeper_that_dies_is_replaced_and_with_the_edge_all_ends(engine: str, home: Path) -> None:
    async def work(host: Host, hub: Sandboxes) -> None:
        sb = await hub.create("container", limits=SMALL)
        (first,) = keepers(home)
        os.kill(int(first), signal.SIGKILL)
        await asyncio.sleep(1)
        (second,) = keepers(home)
        host.kill()
        host.begin()
        assert (await sb.run("echo there")).text == "there\n"
        os.kill(int(second), signal.SIGSTOP)  # it cannot be replaced
        host.kill()
        os.kill(int(second), signal.SIGKILL)
        host.begin()
        with pytest.raises(SandboxLost):
            await sb.run("echo")
        assert traces(sb.id) == []

    held(engine, home, work)


@pytest.mark.boxes
def test_an_edge_that_nobody_follows_takes_nothing_over(home: Path) -> None:
    """Whoever uses the SDK in its own process has sandboxes that end with it."""

    async def work(host: Host, hub: Sandboxes) -> None:
        sb = await hub.create("container", limits=SMALL)
        host.kill()
        edge = await Edge.open(home, [BwrapEngine(home / "engines")])
        assert (edge.lost, edge.adopted) == ([sb.id], []) and traces(sb.id) == [] and keepers(home) == []
        await edge.close()
        host.begin()
        with pytest.raises(SandboxLost):
            await sb.run("echo")

    held("bwrap", home, work)
