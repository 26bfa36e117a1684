"""The SDK over an edge in this process, on real processes and files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from abyssal.sandbox.admission import Capacity
from abyssal.sandbox.api import Exit, Require, Spec, Stderr, Stdout
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.process import ProcessEngine, marked
from abyssal.sandbox.errors import (
    BadRequest,
    Divergence,
    Expired,
    NotFound,
    OutcomeUnknown,
    QuotaExceeded,
    Rejected,
    SandboxLost,
    Unsupported,
)
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.log.reader import read_log
from abyssal.sandbox.replay import branch, rerun, view


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 90))


@asynccontextmanager
async def opened(home: Path, **options: Any) -> AsyncIterator[Edge]:
    edge = await Edge.open(home, [ProcessEngine(allow_unsafe=True)], **options)
    try:
        yield edge
    finally:
        await edge.close()


@asynccontextmanager
async def hub_of(home: Path, **options: Any) -> AsyncIterator[Sandboxes]:
    async with opened(home, **options) as edge, Sandboxes(edge) as hub:
        yield hub


def with_hub(tmp_path: Path, work: Callable[[Sandboxes], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def all_of_it() -> None:
        async with hub_of(tmp_path, **options) as hub:
            await work(hub)

    run(all_of_it())


def test_a_command_and_what_it_says(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container", limits={"memory": "64M", "cpu": 1}, env={"A": "b"}, labels={"job": "j"})
        r = await sb.run("echo $A $TZ; echo err >&2; exit 4", env={"A": "c"})
        assert (r.exit_code, r.text, r.stderr) == (4, "c UTC\n", b"err\n")
        assert (r.boundary, r.replayed, r.truncated, r.timed_out) == ("process", False, False, False)
        assert sb.placed is not None
        assert "nothing is isolated" in sb.placed.degraded[0]
        assert (await sb.run(["cat"], stdin=b"fed")).stdout == b"fed"
        assert (await sb.run("sleep 9", timeout=0.1)).timed_out
        assert (await hub.list(job="j"))[0]["id"] == sb.id
        assert not await hub.list(job="k")
        for wrong in ({"memory": "much"}, {"cores": 2}):
            with pytest.raises(BadRequest):
                await hub.create("container", limits=wrong)

    with_hub(tmp_path, work)


def test_streams_sessions_terminals(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container")
        seen: list[Any] = []
        begin = time.monotonic()
        async for event in sb.stream("echo one; sleep 0.4; echo two; echo bad >&2"):
            seen.append((event, time.monotonic() - begin))
        assert seen[0][0] == Stdout(b"one\n", 0)
        assert seen[0][1] < seen[-1][1] - 0.3  # it came while the command ran
        assert Stdout(b"two\n", 4) in [event for event, _ in seen]
        assert Stderr(b"bad\n", 0) in [event for event, _ in seen]
        assert isinstance(seen[-1][0], Exit)
        s = await sb.session()
        await s.run("mkdir -p 'w x'; cd 'w x'; export A=\"it's 1\"; B=2")
        assert (await s.run('basename "$PWD"; echo "$A-$B"')).text == "w x\nit's 1-\n"
        assert (await s.run("exit 9")).exit_code == 9
        assert (await s.run("sleep 30", timeout=0.2)).timed_out
        assert (await s.run("cd - > /dev/null; basename $PWD; echo $A")).text == "work\nit's 1\n"
        other = await sb.session()
        assert (await other.run("echo [$A]")).text == "[]\n"
        t = await sb.tty(20, 70)
        await t.send(b"stty size\n")
        text = b""
        async for event in t.events():
            text += event.data if isinstance(event, Stdout) else b""
            if b"20 70" in text and b"33 99" not in text:  # it was asked before the size changes
                await t.resize(33, 99)
                await t.send(b"stty size; exit\n")
        assert b"33 99" in text

    with_hub(tmp_path, work)


def test_files(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container")
        big = bytes(range(256)) * (70 << 10)  # more than one read gives
        await sb.files.write("a/b", big, mode=0o640)
        assert await sb.files.read("a/b") == big
        assert await sb.files.read("/work/a/b", offset=255, length=3) == b"\xff\x00\x01"
        stat = await sb.files.stat("a/b")
        assert (stat.kind, stat.size, stat.mode) == ("file", len(big), 0o640)
        await sb.files.move("a/b", "c")
        assert [entry.path for entry in await sb.files.list()] == ["./a", "./c"]
        await sb.files.remove("a")
        with pytest.raises(NotFound):
            await sb.files.read("a/b")
        tree = tmp_path / "tree"
        (tree / "deep").mkdir(parents=True)
        (tree / "deep" / "x").write_text("x")
        (tree / "y").write_text("y")
        await sb.files.upload_tree(tree, "t")
        assert (await sb.run("cat t/deep/x t/y")).text == "xy"
        await sb.files.download_tree("t", tmp_path / "back")
        assert (tmp_path / "back" / "deep" / "x").read_text() == "x"
        watch = sb.files.watch(".", every=0.05)
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.1)
        await sb.run("touch new")
        assert await waiting == ("added", "./new")
        await watch.aclose()

    with_hub(tmp_path, work)


def test_background_commands_are_listed_and_waited_for(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container")
        server = await sb.start("read x; echo got $x", stdin=True)
        other = await sb.start("sleep 60")
        assert {running.op_id for running in await sb.processes()} == {server.op_id, other.op_id}
        await server.write(b"hi\n", end=True)
        assert (await server.wait()).text == "got hi\n"
        await other.signal(9)
        assert (await other.wait()).signal == 9
        assert not await sb.processes()

    with_hub(tmp_path, work)


def test_the_edge_owns_time_to_live(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        short = await hub.create("container", ttl=0.6)
        idle = await hub.create("container", idle_ttl=0.6)
        kept = await hub.create("container", ttl=0.6)
        await kept.set_ttl(60)
        busy = await idle.start("sleep 1.5; echo done")  # a running operation is activity
        await short.start("sleep 60")
        await asyncio.sleep(1.2)
        with pytest.raises(Expired):
            await short.run("true")
        assert not list(marked("ABYSSAL_BOX", short.id))
        assert (await busy.wait()).text == "done\n"
        assert (await kept.run("echo on")).text == "on\n"
        await asyncio.sleep(1.2)
        with pytest.raises(Expired):
            await idle.run("true")
        records = [record async for record in short.log()]
        assert records[-1]["kind"] == "expire"
        assert records[-1]["res"] == {"why": "ttl"}

    with_hub(tmp_path, work)


def test_leaving_stops_what_was_created_and_not_detached(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as edge:
            async with Sandboxes(edge) as hub:
                stopped = await hub.create("container")
                kept = (await hub.create("container")).detach()
                attached = await hub.attach(kept)
                await attached.run("echo x > f")
            async with Sandboxes(edge) as hub:
                with pytest.raises(NotFound, match="stopped"):
                    await hub.attach(stopped.id) and await (await hub.attach(stopped.id)).run("true")
                assert (await (await hub.attach(kept)).files.read("f")) == b"x\n"
        head = read_log(tmp_path / "boxes" / stopped.id / "log").head
        assert head in (tmp_path / "heads.jsonl").read_text()
        assert not (tmp_path / "live" / stopped.id).exists()

    run(work())


def test_an_edge_that_starts_again_goes_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as edge, Sandboxes(edge) as hub:
            sb = await hub.create("container", op_id="make", ttl=600)
            await sb.run("echo a >> f")
            snap = await sb.snapshot()
            await sb.run("echo b >> f")
            sb.detach()
        async with opened(tmp_path) as edge, Sandboxes(edge) as hub:
            assert edge.adopted == [sb.id]
            again = await hub.create("container", op_id="make", ttl=600)  # as a client does that knows nothing
            assert again.id == sb.id
            assert (await again.run("echo a >> f")).replayed
            assert (await again.snapshot()).id == snap.id
            assert (await again.run("echo b >> f")).replayed
            live = await again.run("cat f")
            assert (live.replayed, live.text) == (False, "a\nb\n")
            with pytest.raises(Divergence):
                await hub.create("container", op_id="make", ttl=500)
            old = await hub.create("container", snapshot=snap)
            assert (await old.run("cat f")).text == "a\n"
            info = await old.info()
            assert info["parent"]["sandbox"] == sb.id

    run(work())


def test_what_does_not_live_is_lost_and_leftovers_are_swept(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as edge, Sandboxes(edge) as hub:
            sb = await hub.create("container")
            await sb.run("echo kept")
            sb.detach()
        work_folder = tmp_path / "live" / sb.id / "work"
        work_folder.rmdir()
        (tmp_path / "boxes" / "nobody").mkdir()
        (tmp_path / "live" / "nothing").mkdir()
        async with opened(tmp_path) as edge, Sandboxes(edge) as hub:
            assert edge.lost == [sb.id]
            assert sorted(edge.swept) == sorted(["nobody", "nothing", sb.id])
            again = await hub.attach(sb.id, stream="main")
            assert (await again.run("echo kept")).text == "kept\n"
            with pytest.raises(SandboxLost):
                await again.run("echo more")
        with pytest.raises(Rejected, match="another edge"):
            async with opened(tmp_path), opened(tmp_path):
                pass

    run(work())


def test_forks_and_groups(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container", labels={"job": "g"})
        await sb.run("echo p > f")
        kids = await sb.fork(3)
        for number, kid in enumerate(kids):
            await kid.run(f"echo {number} >> f")
        assert [(await kid.run("cat f")).text for kid in kids] == ["p\n0\n", "p\n1\n", "p\n2\n"]
        assert (await sb.run("cat f")).text == "p\n"
        records = [record async for record in kids[0].log()]
        assert records[0]["parent"]["sandbox"] == sb.id
        assert len(await hub.list(job="g")) == 4
        counter = await sb.start("while :; do echo x >> ticks; sleep 0.02; done")
        await asyncio.sleep(0.3)
        assert set(await hub.pause("job", "g")) == {sb.id, *(kid.id for kid in kids)}
        size = (tmp_path / "live" / sb.id / "work" / "ticks").stat().st_size
        await asyncio.sleep(0.3)
        assert (tmp_path / "live" / sb.id / "work" / "ticks").stat().st_size == size
        assert (await sb.info())["status"] == "paused"
        await hub.resume("job", "g")
        await asyncio.sleep(0.3)
        assert (tmp_path / "live" / sb.id / "work" / "ticks").stat().st_size > size
        await hub.stop("job", "g")
        assert not await hub.list(job="g")
        with pytest.raises(NotFound):
            await counter.wait()

    with_hub(tmp_path, work)


def test_what_cannot_be_met_is_refused(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        with pytest.raises(Unsupported, match="boundary is process, user-kernel is required"):
            await hub.create("container", require=Require(boundary="user-kernel"))
        with pytest.raises(Unsupported, match="hard limits"):
            await hub.create("container", require=Require(hard=True))
        with pytest.raises(Unsupported, match="no microvm can be run"):
            await hub.create("microvm")
        with pytest.raises(Unsupported, match="engine process knows the image host"):
            await hub.create("container", image="debian-py")
        assert not (await hub.capabilities())["used"]["sandboxes"]
        assert not list((tmp_path / "boxes").iterdir()) + list((tmp_path / "live").iterdir())
        sb = await hub.create("container")
        with pytest.raises(Unsupported, match="memory"):
            await sb.snapshot(memory=True)

    with_hub(tmp_path, work)
    with pytest.raises(Unsupported, match="allow_unsafe"):
        ProcessEngine()


def test_divergence_can_fork(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container")
        for text in ("echo a >> f", "cat f", "echo b >> f"):
            await sb.run(text)
        strict = await hub.attach(sb.id, stream="main")
        await strict.run("echo a >> f")
        with pytest.raises(Divergence):
            await strict.run("wc -c f")
        again = await hub.attach(sb.id, stream="main", on_divergence="fork")
        assert (await again.run("echo a >> f")).replayed
        assert (await again.run("cat f")).replayed
        assert (await again.run("echo c >> f; cat f")).text == "a\nc\n"
        assert again.id != sb.id
        assert (await again.run("cat f")).text == "a\nc\n"
        assert (await (await hub.attach(sb.id)).run("cat f")).text == "a\nb\n"
        third = await hub.attach(again.id, stream="main")
        assert (await third.run("echo a >> f")).replayed

    with_hub(tmp_path, work)


def test_replay_compares(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container")
        await sb.files.write("in", b"z" * 5000)
        await sb.run("sort in > out; wc -c < out")
        await sb.run("date +%N")
        await sb.run("echo took $(date +%N | cut -c 1-3)ms")
        await sb.run("exit 3")
        await sb.files.list()
        with pytest.raises(NotFound):
            await sb.files.read("none")
        await sb.files.download_tree(".", tmp_path / "down")
        snap = await sb.snapshot()
        await sb.run("echo later > out")
        t = await sb.start("cat", stdin=True)
        await t.write(b"x", end=True)
        await t.wait()
        shown = await view(hub.service, sb.id)
        assert [entry["req"]["op"] for entry in shown][:3] == ["file.write", "exec", "exec"]
        found = await rerun(hub.service, sb.id)
        verdicts = [row.verdict for row in found.rows]
        assert verdicts == [
            "equal", "equal", "different", "different", "equal", "equal", "equal", "equal", "not comparable", "equal",
            "not comparable", "not comparable",
        ]  # fmt: skip
        found = await rerun(hub.service, sb.id, normalisers=["clocks"])
        assert found.rows[3].verdict == "equal"
        await sb.stop()
        assert (await rerun(hub.service, sb.id)).count("equal") == 7  # the log is enough
        assert snap.digests["layer"]

    with_hub(tmp_path, work)


def test_branch_begins_from_a_snapshot(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        sb = await hub.create("container")
        await sb.run("date +%N > f")  # cannot be run again to the same state
        await sb.snapshot()
        first = (await sb.run("cat f; echo x >> g")).text
        last = await sb.run("echo y >> g")
        child = await hub.attach(await branch(hub.service, sb.id, last.seq))
        assert (await child.run("cat f g")).text == f"{first}x\n"
        await child.stop()

    with_hub(tmp_path, work)


def test_warm_boxes_leave_nothing(tmp_path: Path) -> None:
    spec = Spec("container", cwd="/work")

    async def work() -> None:
        async with opened(tmp_path, warm=[(spec, 3)]) as edge:
            await edge.pool.full()
            assert len(edge.pool.ids) == 3
            async with Sandboxes(edge) as hub:
                ids = set(edge.pool.ids)
                sb = await hub.create("container", labels={"job": "a"}, ttl=50)
                assert sb.id in ids
                assert (await sb.run("echo hi")).text == "hi\n"
                assert (await hub.create("container", env={"X": "y"})).id not in ids
                await edge.pool.full()
        assert not list((tmp_path / "live").iterdir())

    run(work())


def test_room_quotas_and_turns(tmp_path: Path) -> None:
    async def work(hub: Sandboxes) -> None:
        first = [await hub.create("container", labels={"job": "many"}) for _ in range(2)]
        order: list[str] = []

        async def one(job: str) -> None:
            sb = await hub.create("container", labels={"job": job})
            order.append(job)
            await sb.stop()

        waiting = [asyncio.create_task(one("many")) for _ in range(6)]
        await asyncio.sleep(0.1)
        waiting.append(asyncio.create_task(one("few")))
        await asyncio.sleep(0.1)
        with pytest.raises(Rejected, match="wait already"):
            await hub.create("container", labels={"job": "late"})
        assert not order
        await first[0].stop()
        await asyncio.gather(*waiting)
        assert "few" in order[:2]  # not behind all of the others
        with pytest.raises(Rejected, match="never fits"):
            await hub.create("container", limits={"memory": "99G"})
        assert (await hub.capabilities())["used"]["sandboxes"] == 1

    with_hub(tmp_path, work, capacity=Capacity(sandboxes=2, waiting=7))

    async def quota(hub: Sandboxes) -> None:
        await hub.create("container", labels={"job": "a"})
        with pytest.raises(QuotaExceeded):
            await hub.create("container", labels={"job": "a"})
        await hub.create("container", labels={"job": "b"})

    with_hub(tmp_path / "q", quota, capacity=Capacity(per_job=1))

    async def patience(hub: Sandboxes) -> None:
        await hub.create("container")
        with pytest.raises(Rejected, match="no room within"):
            await hub.create("container")
        assert (await hub.capabilities())["used"]["waiting"] == 0

    with_hub(tmp_path / "p", patience, capacity=Capacity(sandboxes=1, patience=0.2))


def test_unknown_outcomes_reach_the_sdk(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as edge:
            hub = Sandboxes(edge)
            sb = await hub.create("container", op_id="c")
            await sb.start("echo x >> f; sleep 60")
            await asyncio.sleep(0.3)
        async with opened(tmp_path) as edge, Sandboxes(edge) as hub:
            sb = await hub.create("container", op_id="c")
            with pytest.raises(OutcomeUnknown) as caught:
                await sb.start("echo x >> f; sleep 60")
            await sb.resolve(caught.value.op_id, state="done", exit_code=0)
            again = await hub.attach(sb.id, stream="main")
            assert (await again.run("echo x >> f; sleep 60")).replayed
            assert (await again.run("cat f")).text == "x\n"

    run(work())


def test_an_engine_that_is_offered_no_more_loses_its_sandboxes_and_no_others(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as edge, Sandboxes(edge) as hub:
            sb = await hub.create("container")
            await sb.run("echo kept")
            sb.detach()
        edge = await Edge.open(tmp_path, [])
        assert edge.lost == [sb.id] and "not offered" in (await edge.info(sb.id))["why"]
        again = await Sandboxes(edge).attach(sb.id, stream="main")
        assert (await again.run("echo kept")).text == "kept\n"
        with pytest.raises(SandboxLost):
            await again.run("echo more")
        await edge.close()

    run(work())
