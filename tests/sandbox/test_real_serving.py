"""A server of real containers: the SDK, raw HTTP and E2B's client through it, and what its end does to them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from abyssal.sandbox.api import Stdout
from abyssal.sandbox.errors import OutcomeUnknown, SandboxLost, Unsupported
from abyssal.sandbox.hub import Sandboxes
from tests.sandbox.serving import Served
from tests.sandbox.traces import traces

BOUNDARY = {"runc": "shared-kernel", "bwrap": "shared-kernel", "gvisor": "user-kernel"}
SMALL = {"memory": "128M", "pids": 300, "disk": "64M"}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def works(server: Served) -> None:
    """Skip, with the reason, unless the engine runs here."""
    with httpx2.Client(base_url=server.url, timeout=100) as http:
        (found,) = http.get("/v1/capabilities").json()["engines"]
    if not found["ok"]:
        server.end()
        pytest.skip(f"{found['name']}: {found['detail']} ({found['remedy']})")


@pytest.fixture(scope="module", params=list(BOUNDARY))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, programs: Path
) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("edge")
    shutil.copytree(programs, home / "engines" / "programs")
    with Served(home, engine=request.param) as server:
        works(server)
        yield server


def test_the_sdk(served: Served) -> None:
    async def work() -> None:
        async with Sandboxes.connect(served.url) as hub:
            sb = await hub.create("container", limits=SMALL)
            r = await sb.run("cat; echo err >&2; exit 2", stdin=b"\xff\x00in", timeout=20)
            assert (r.exit_code, r.stdout, r.stderr) == (2, b"\xff\x00in", b"err\n")
            assert (r.boundary, sb.placed and sb.placed.engine) == (BOUNDARY[served.engine], served.engine)
            await sb.files.write("d/f", b"x" * 300_000, mode=0o600)
            assert (await sb.run("wc -c < d/f")).text == "300000\n"
            s = await sb.session()
            await s.run("cd /tmp; export A=1")
            assert (await s.run("pwd; echo $A")).text == "/tmp\n1\n"
            t = await sb.tty(20, 70)
            await t.resize(31, 71)
            await t.send(b"stty size; exit\n")
            assert b"31 71" in b"".join([event.data async for event in t.events() if isinstance(event, Stdout)])
            again = await hub.attach(sb.id, stream="main")
            assert (await again.run("cat; echo err >&2; exit 2", stdin=b"\xff\x00in", timeout=20)).replayed
            made = sb.id
            if "fork" in (await hub.capabilities())["engines"][0]["features"]:
                (kid,) = await sb.fork(1)
                assert (await kid.run("wc -c < d/f")).text == "300000\n"
            else:
                with pytest.raises(Unsupported):
                    await sb.fork(1)
        assert traces(made) == []

    run(work())


def test_raw_calls(served: Served) -> None:
    with httpx2.Client(base_url=served.url, timeout=60) as http:
        spec = {"substrate": "container", "limits": {"memory": 128 << 20, "pids": 300, "disk": 64 << 20}}
        made = http.post("/v1/sandboxes", json={"spec": spec}).json()
        own = f"/v1/sandboxes/{made['id']}"
        answer = http.post(f"{own}/exec", json={"shell": "echo x >> f; cat f"}, headers={"Idempotency-Key": "k"}).json()
        assert answer["streams"]["stdout"]["text"] == "x\n"
        again = http.post(f"{own}/exec", json={"shell": "echo x >> f; cat f"}, headers={"Idempotency-Key": "k"}).json()
        assert (again["replayed"], again["streams"]["stdout"]["text"]) == (True, "x\n")
        op = http.post(f"{own}/exec", json={"argv": ["sleep", "90"], "mode": "detach"}).json()["op_id"]
        assert http.post(f"{own}/ops/{op}/signal", json={"signal": 9}).status_code == 200
        assert http.get(f"{own}/ops/{op}", params={"wait": "1"}).json()["res"]["state"] == "cancelled"
        assert http.get(f"{own}/files", params={"path": "f"}).content == b"x\n"
        assert http.get(f"{own}/files", params={"path": "../../../../etc/shadow"}).status_code in (400, 404)
        assert http.delete(own).status_code == 204
        assert traces(made["id"]) == []


def test_e2b(served: Served) -> None:
    e2b = pytest.importorskip("e2b")
    where = {"api_url": served.url, "sandbox_url": served.url, "http_version": "1.1", "retries": 0}
    sandbox = e2b.Sandbox.create(timeout=120, api_key="e2b_" + "0" * 40, **where)
    try:
        assert sandbox.commands.run("echo out; id -u").stdout == "out\n1000\n"
        sandbox.files.write("d/f.txt", "text")
        assert sandbox.files.read("d/f.txt") == "text"
        handle = sandbox.commands.run("cat", background=True, stdin=True)
        sandbox.commands.send_stdin(handle.pid, "all")
        sandbox.commands.close_stdin(handle.pid)
        assert sandbox.commands.connect(handle.pid).wait().stdout == "all"
    finally:
        assert sandbox.kill()


@pytest.mark.parametrize("engine", ["runc", "bwrap"])
def test_a_killed_server_takes_its_containers_with_it_and_says_so(engine: str, home: Path) -> None:
    """Where they are not to outlive it: what had ended is answered from the log, what had begun is unknown."""

    async def work(server: Served) -> None:
        async with Sandboxes.connect(server.url) as hub:
            sb = await hub.create("container", limits=SMALL)
            assert (await sb.run("echo a")).text == "a\n"
            running = asyncio.create_task(sb.run("echo b; sleep 100"))
            await asyncio.sleep(0.5)
            server.end(signal.SIGKILL)
            assert traces(sb.id)
            await asyncio.to_thread(server.start)
            assert traces(sb.id) == []
            with pytest.raises(OutcomeUnknown) as caught:  # the client asked again by itself
                await running
            await sb.resolve(caught.value.op_id, state="failed", exit_code=1)
            again = await hub.attach(sb.id, stream="main")
            first = await again.run("echo a")
            assert (first.replayed, first.text) == (True, "a\n")
            assert (await again.run("echo b; sleep 100")).exit_code == 1
            with pytest.raises(SandboxLost):
                await again.run("echo c")

    with Served(home, "--grace", "0", engine=engine) as server:
        works(server)
        run(work(server))


def test_a_server_that_ends_in_good_order_leaves_nothing(home: Path) -> None:
    with Served(home, engine="runc") as server:
        works(server)
        with httpx2.Client(base_url=server.url, timeout=60) as http:
            made = http.post("/v1/sandboxes", json={"spec": {"substrate": "container"}}).json()["id"]
            http.post(f"/v1/sandboxes/{made}/exec", json={"argv": ["sleep", "90"], "mode": "detach"})
            assert traces(made)
        begin = time.monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert traces(made) == [] and time.monotonic() - begin < 20
        assert not [path for path in home.rglob("*") if os.path.ismount(path)]
