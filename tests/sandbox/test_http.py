"""The routes of sandbox.md 5 on a real server process: the same SDK, raw HTTP, tokens, quotas, terminals, crashes."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import websockets

from abyssal.sandbox.api import Exit, Network, Stdout
from abyssal.sandbox.errors import (
    BadRequest,
    Divergence,
    NotFound,
    OutcomeUnknown,
    QuotaExceeded,
    SandboxError,
    Timeout,
    Unsupported,
)
from abyssal.sandbox.http.client import HttpService
from abyssal.sandbox.http.routes import STATUS
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.replay import rerun
from abyssal.sandbox.shapes import error_json, error_of
from tests.sandbox.serving import Served


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("edge")) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--project", "red=red-token=2", "--project", "blue=blue-token")
    with Served(tmp_path_factory.mktemp("edge"), *options) as server:
        yield server


def test_the_sdk_is_the_same(served: Served, tmp_path: Path) -> None:
    async def work() -> None:
        async with Sandboxes.connect(served.url) as hub:
            sb = await hub.create("container", labels={"job": "h"}, limits={"output": 4000})
            r = await sb.run("cat; echo err >&2; exit 2", stdin=b"\xff\x00in", timeout=5)
            assert (r.exit_code, r.stdout, r.stderr, r.boundary) == (2, b"\xff\x00in", b"err\n", "process")
            r = await sb.run("seq 10000")
            assert (r.truncated, len(r.stdout)) == (True, 4000)
            events = [event async for event in sb.stream("echo a; sleep 0.1; echo b")]
            assert b"".join(event.data for event in events if isinstance(event, Stdout)) == b"a\nb\n"
            assert isinstance(events[-1], Exit)
            s = await sb.session()
            await s.run("cd /; export A=1")
            assert (await s.run("pwd; echo $A")).text == "/\n1\n"
            data = bytes(range(256)) * (70 << 10)
            await sb.files.write("d/f", data, mode=0o600)
            assert await sb.files.read("d/f") == data
            assert (await sb.files.stat("d/f")).mode == 0o600
            await sb.files.make_folder("e")
            await sb.files.move("d/f", "e/f")
            assert [entry.path for entry in await sb.files.list("e")] == ["e/f"]
            await sb.files.remove("e")
            (tmp_path / "t").mkdir()
            (tmp_path / "t" / "x").write_text("x")
            await sb.files.upload_tree(tmp_path / "t", "t")
            await sb.files.download_tree("t", tmp_path / "u")
            assert (tmp_path / "u" / "x").read_text() == "x"
            background = await sb.start("read x; echo $x", stdin=True)
            assert [one.op_id for one in await sb.processes()] == [background.op_id]
            await background.write(b"fed\n", end=True)
            assert (await background.wait()).text == "fed\n"
            sleeper = await sb.start("sleep 50")
            await sleeper.signal(9)
            assert (await sleeper.wait()).signal == 9
            t = await sb.tty(20, 70)
            await t.resize(31, 71)
            await t.send(b"stty size; exit\n")
            assert b"31 71" in b"".join([event.data async for event in t.events() if isinstance(event, Stdout)])
            snap = await sb.snapshot()
            copy = await hub.create("container", snapshot=snap)
            assert (await copy.run("cat t/x")).text == "x"
            (kid,) = await sb.fork(1)
            assert (await kid.run("cat t/x")).text == "x"
            await sb.pause()
            await sb.resume()
            await sb.set_ttl(77)
            with pytest.raises(Unsupported):
                await sb.set_network(Network())
            records = [record async for record in sb.log()]
            assert [record["seq"] for record in records] == list(range(len(records)))
            assert (await rerun(hub.service, copy.id)).count("equal") == 1
            again = await hub.attach(sb.id, stream="main")
            assert (await again.run("cat; echo err >&2; exit 2", stdin=b"\xff\x00in", timeout=5)).replayed
            with pytest.raises(Divergence) as caught:
                await again.run("other")
            assert caught.value.seq > 0
            with pytest.raises(NotFound):
                await sb.run(["no-such-program"])
            with pytest.raises(BadRequest):
                await hub.create("container", limits={"pids": -1, "memory": "x"})
            assert await hub.stop("job", "h")
            assert not await hub.list(job="h")

    run(work())


def test_raw_calls(served: Served) -> None:
    with httpx2.Client(base_url=served.url, timeout=30) as http:
        capabilities = http.get("/v1/capabilities").json()
        assert capabilities["engines"][0]["name"] == "process"
        made = http.post("/v1/sandboxes", json={"spec": {"substrate": "container"}}, headers={"Idempotency-Key": "k1"})
        assert made.status_code == 201
        sandbox = made.json()["id"]
        again = http.post("/v1/sandboxes", json={"spec": {"substrate": "container"}}, headers={"Idempotency-Key": "k1"})
        assert again.json()["id"] == sandbox
        own = f"/v1/sandboxes/{sandbox}"
        for replayed in (False, True):
            answer = http.post(
                f"{own}/exec", json={"shell": "echo x >> f; cat f"}, headers={"Idempotency-Key": "k2"}
            ).json()
            assert answer["replayed"] == replayed
            assert answer["streams"]["stdout"]["text"] == "x\n"
            assert answer["res"]["exit_code"] == 0
        looked = http.get(f"{own}/ops/k2").json()
        assert (looked["state"], looked["streams"]["stdout"]["text"]) == ("done", "x\n")
        begun = http.post(f"{own}/exec", json={"argv": ["sleep", "40"], "mode": "detach"})
        assert begun.status_code == 202
        op = begun.json()["op_id"]
        assert http.get(f"{own}/ops/{op}").json()["state"] == "running"
        assert http.post(f"{own}/ops/{op}/signal", json={"signal": 15}).status_code == 200
        assert http.get(f"{own}/ops/{op}", params={"wait": "1"}).json()["res"]["state"] == "cancelled"
        with http.stream("POST", f"{own}/exec", json={"shell": "echo one; echo two", "mode": "stream"}) as response:
            text = response.read().decode()
        ids = [line for line in text.splitlines() if line.startswith("id: ")]
        assert ids[-1] == "id: 8,0"
        assert "event: exit" in text
        op = json.loads(text.split("data: ")[1].splitlines()[0])["op_id"]
        text = http.get(f"{own}/ops/{op}/events", params={"from": "4,0"}).text
        assert '"offset": 4' in text
        assert '"offset": 0' not in text
        assert http.put(f"{own}/files", params={"path": "a/b"}, content=b"\x00raw").status_code == 200
        got = http.get(f"{own}/files", params={"path": "a/b", "offset": 1})
        assert (got.content, got.headers["x-op-replayed"]) == (b"raw", "0")
        lines = http.get(f"{own}/log").text.splitlines()
        assert [json.loads(line)["seq"] for line in lines] == list(range(len(lines)))
        view = http.post("/v1/replays", json={"sandbox": sandbox}).json()
        assert view["rows"][0]["req"]["argv"][2] == "echo x >> f; cat f"
        assert http.post("/v1/replays", json={"sandbox": sandbox, "mode": "rerun"}).json()["rows"]
        assert "abyssal_sandbox_operations_total" in http.get("/metrics").text
        for body, status in (
            ({}, 400), ({"argv": []}, 400), ({"shell": 3}, 400), ({"shell": "x", "timeout": -1}, 400),
            ({"shell": "x", "mode": "later"}, 400), ({"shell": "x", "unknown": 1}, 400),
            ({"shell": "x", "tty": [0, 1]}, 400), ({"shell": "x", "cwd": "/nowhere-at-all"}, 400),
        ):  # fmt: skip
            assert http.post(f"{own}/exec", json=body).status_code == status, body
        assert http.post(f"{own}/exec", content=b"{").status_code == 400
        for path, status in (
            ("files", 400), ("files?path=none", 404), ("files?path=a", 400), ("files?path=../../../etc/passwd", 400),
            ("files:list?path=none", 404), ("files?path=a/b&offset=x", 400), ("ops/none", 404),
        ):  # fmt: skip
            assert http.get(f"{own}/{path}").status_code == status, path
        assert http.get("/v1/sandboxes/none").status_code == 404
        assert http.post("/v1/groups/none:explode").status_code == 404
        assert http.delete(own).status_code == 204
        assert http.delete(own).status_code == 204
        assert http.post(f"{own}/exec", json={"shell": "true"}).status_code == 404
        assert http.get(f"{own}/log").text.splitlines()[-1].find('"destroy"') > 0


def test_tokens_and_quotas(guarded: Served) -> None:
    async def work() -> None:
        with pytest.raises(SandboxError, match="token"):
            async with Sandboxes.connect(guarded.url) as hub:
                await hub.create("container")
        with pytest.raises(SandboxError, match="token"):
            async with Sandboxes.connect(guarded.url, token="wrong") as hub:
                await hub.create("container")
        async with (
            Sandboxes.connect(guarded.url, token="red-token") as red,
            Sandboxes.connect(guarded.url, token="blue-token") as blue,
        ):
            mine = await red.create("container", op_id="same-name", labels={"job": "j"})
            await mine.files.write("f", b"red")
            with pytest.raises(NotFound):
                await blue.attach(mine.id)
            assert not await blue.list()
            assert not await blue.pause("job", "j")
            with pytest.raises((NotFound, Divergence)):
                await blue.create("container", op_id="same-name", labels={"job": "j"})
            with pytest.raises(NotFound):
                await blue.create("container", snapshot=(await mine.snapshot()))
            await red.create("container")
            with pytest.raises(QuotaExceeded):
                await red.create("container")
            records = [record async for record in mine.log()]
            assert records[0]["actor"] == "red"
        async with httpx2.AsyncClient(base_url=guarded.url) as http:
            headers = {"Authorization": "Bearer red-token"}
            made = (await http.post("/v1/sandboxes", json={"spec": {"substrate": "container"}}, headers=headers)).json()
            other = (
                await http.post("/v1/sandboxes", json={"spec": {"substrate": "container"}}, headers=headers)
            ).json()
            own = {"Authorization": f"Bearer {made['token']}"}
            body = {"shell": "echo in"}
            assert (await http.post(f"/v1/sandboxes/{made['id']}/exec", json=body, headers=own)).status_code == 200
            assert (await http.post(f"/v1/sandboxes/{other['id']}/exec", json=body, headers=own)).status_code == 404
            assert (await http.get("/v1/sandboxes", headers=own)).status_code == 401
            forged = {"Authorization": f"Bearer {made['token'][:-1]}0"}
            if forged != own:
                assert (
                    await http.post(f"/v1/sandboxes/{made['id']}/exec", json=body, headers=forged)
                ).status_code == 401
            assert (await http.get("/metrics")).status_code == 401
            for name in (made["id"], other["id"]):
                await http.delete(f"/v1/sandboxes/{name}", headers=headers)

    run(work())


def test_a_terminal_over_websocket(served: Served) -> None:
    async def work() -> None:
        async with Sandboxes.connect(served.url) as hub:
            sb = await hub.create("container")
            address = f"{served.url.replace('http', 'ws')}/v1/sandboxes/{sb.id}/tty"
            async with websockets.connect(f"{address}?rows=20&columns=60") as socket:
                op_id = json.loads(await socket.recv())["op_id"]
                await socket.send(json.dumps({"resize": [22, 66]}))
                await socket.send(b"stty size\n")
                seen = b""
                while b"22 66" not in seen:
                    part = await socket.recv()
                    assert isinstance(part, bytes)
                    seen += part
            async with websockets.connect(f"{address}?op={op_id}") as socket:  # it went on without us
                await socket.recv()
                await socket.send(b"exit 5\n")
                last: str | bytes = b""
                async for part in socket:
                    last = part
                assert json.loads(last)["exit"]["code"] == 5
            async with websockets.connect(f"{served.url.replace('http', 'ws')}/v1/sandboxes/none/tty") as socket:
                assert json.loads(await socket.recv())["error"]["type"] == "NotFound"

    run(work())


def test_a_killed_server_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        with Served(tmp_path / "edge") as server:
            async with Sandboxes.connect(server.url) as hub:
                sb = await hub.create("container")
                await sb.run("echo a >> f")
                running = asyncio.create_task(sb.run("echo b >> f; sleep 30; echo c >> f"))
                await asyncio.sleep(0.5)
                server.end(signal.SIGKILL)
                await asyncio.to_thread(server.start)
                with pytest.raises(OutcomeUnknown) as caught:  # the client asked again by itself
                    await running
                await sb.resolve(caught.value.op_id, state="failed", exit_code=1)
                again = await hub.attach(sb.id, stream="main")
                assert (await again.run("echo a >> f")).replayed
                assert (await again.run("echo b >> f; sleep 30; echo c >> f")).exit_code == 1
                assert (await again.run("cat f")).text == "a\nb\n"
            assert server.end() == 0
            with pytest.raises(Timeout, match="nobody answers"):
                await HttpService(server.url, reconnect=0.1).health()
            server.start()

    run(work())


def test_every_error_travels() -> None:
    for kind in STATUS:
        more = {"LimitHit": ["memory"], "Divergence": [3, "a", "b"], "OutcomeUnknown": ["op"], "AgentLost": ["oom"]}
        error: SandboxError = kind(*more.get(kind.__name__, []), "m")
        back = error_of(json.loads(json.dumps(error_json(error))))
        assert type(back) is kind
        assert error_json(back) == error_json(error)


def test_the_local_edge_starts_by_itself(tmp_path: Path) -> None:
    async def work() -> None:
        from abyssal.sandbox.http.daemon import end, local

        async def first() -> HttpService:
            return await local(tmp_path, unsafe=True)

        try:
            one, two = await asyncio.gather(first(), first())
            assert await one.health() == await two.health()
            async with Sandboxes(one) as hub:
                assert (await (await hub.create("container")).run("echo hi")).text == "hi\n"
            await one.close()
            await two.close()
        finally:
            assert await end(tmp_path)

    run(work())
