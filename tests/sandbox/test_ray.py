"""Sandboxes on three Ray nodes: real raylets on this machine, an edge on each, room for one sandbox in each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from abyssal.sandbox import sync
from abyssal.sandbox.admission import Capacity
from abyssal.sandbox.api import Exit, Stdout
from abyssal.sandbox.engines.process import MARK, kill_marked
from abyssal.sandbox.errors import AgentLost, NotFound, OutcomeUnknown, Rejected, SandboxError, SandboxLost, Unsupported
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.sandbox import Sandbox

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from abyssal.sandbox.scale.actor import EdgeSettings  # noqa: E402
from abyssal.sandbox.scale.nodes import edge_id  # noqa: E402
from abyssal.sandbox.scale.service import RayService  # noqa: E402

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all
COMMAND = "from abyssal.cli.main import main; main()"
NAMES = ("one", "two", "three")
SETTINGS = EdgeSettings(
    engines=("runc", "process"), allow_unsafe=True, capacity=Capacity(sandboxes=1, waiting=0, memory=1 << 30)
)


class Nodes:
    """The cluster and a service that speaks to it."""

    def __init__(self, cluster: Any, others: dict[str, Any]):
        self.cluster, self.others = cluster, others
        self.service = asyncio.run(RayService.open("ray://auto", SETTINGS))
        self.used: list[str] = []

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run(asyncio.wait_for(work, 120))

    async def create(self, hub: Sandboxes, **options: Any) -> Sandbox:
        sandbox = await hub.create("container", **{"engine": "process", **options})
        self.used.append(sandbox.id)
        return sandbox


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Nodes]:
    home = tmp_path_factory.mktemp("nodes")
    for name in NAMES:  # the guest agent, compiled once
        folder = home / "sandbox" / "ray" / edge_id(name) / "engines"
        folder.mkdir(parents=True)
        (folder / "programs").symlink_to(programs)
    room = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABYSSAL_HOME", str(home))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**room, "node_name": "one"})
        begun: list[psutil.Process] = []
        made: Nodes | None = None
        try:
            others = {name: cluster.add_node(**room, node_name=name) for name in NAMES[1:]}
            patch.setenv("RAY_ADDRESS", cluster.address)
            made = Nodes(cluster, others)
            yield made
        finally:
            begun = psutil.Process().children(recursive=True)
            if made is not None:
                asyncio.run(made.service.close())
            cluster.shutdown()
            for name in made.used if made is not None else ():
                kill_marked(MARK, name, signal.SIGKILL)
            _, left = psutil.wait_procs(begun, timeout=20)
            for process in left:
                process.kill()
    assert not left, left


def test_one_on_each_node_and_no_more_than_fit(nodes: Nodes) -> None:
    async def work() -> None:
        async with Sandboxes(nodes.service) as hub:
            boxes = [await nodes.create(hub, labels={"n": str(n)}) for n in range(3)]
            assert {await nodes.service.node(box.id) for box in boxes} == set(NAMES)
            for box in boxes:
                assert box.id.startswith(edge_id(await nodes.service.node(box.id)) + "-")
                assert (await box.run("echo $A", env={"A": box.id})).text == box.id + "\n"
            assert {info["id"] for info in await hub.list()} == {box.id for box in boxes}
            assert [info["id"] for info in await hub.list(n="1")] == [boxes[1].id]
            with pytest.raises(Rejected, match=r"one: .*three: .*two: "):
                await nodes.create(hub)
            await boxes[1].stop()  # the two full ones reject, and the third takes it
            again = await nodes.create(hub, op_id="named")
            assert await nodes.service.node(again.id) == await nodes.service.node(boxes[1].id)
            assert (await nodes.create(hub, op_id="named")).id == again.id
            assert set(await hub.stop("n", "0")) == {boxes[0].id}
            edges = (await hub.capabilities())["edges"]
            assert {edge["edge"] for edge in edges} == {edge_id(name) for name in NAMES}
            assert sum(edge["used"]["sandboxes"] for edge in edges) == 2

    nodes.run(work())


def test_errors_keep_their_type(nodes: Nodes) -> None:
    async def work() -> None:
        async with Sandboxes(nodes.service) as hub:
            with pytest.raises(Unsupported, match="no node of the Ray cluster can run it"):
                await hub.create("vm")
            with pytest.raises(NotFound, match="no node of this Ray cluster has edge 'ffffffff'"):
                await hub.attach("ffffffff-" + "0" * 32)
            with pytest.raises(NotFound, match="no sandbox"):
                await hub.attach(f"{edge_id('two')}-{'0' * 32}")
            box = await nodes.create(hub)
            with pytest.raises(NotFound):
                await box.files.read("none")
            sleeping = await box.start(["sleep", "60"])
            await box.stop()
            with pytest.raises((AgentLost, NotFound)):
                await sleeping.wait()

    nodes.run(work())


def test_streams(nodes: Nodes) -> None:
    async def work() -> None:
        async with Sandboxes(nodes.service) as hub:
            box = await nodes.create(hub)
            events = [event async for event in box.stream("echo a; sleep 0.2; echo b; yes | head -c 3000000")]
            assert isinstance(events[-1], Exit)
            assert b"".join(e.data for e in events if isinstance(e, Stdout)).startswith(b"a\nb\ny\n")
            data = os.urandom(1 << 20)
            await box.files.write("f", data)
            assert await box.files.read("f") == data
            following = nodes.service.log(box.id, 0, follow=True)
            assert [(await anext(following))["kind"] for _ in range(2)] == ["create", "ready"]
            await following.aclose()

    nodes.run(work())


def test_an_edge_that_is_restarted_answers_from_its_folder(nodes: Nodes) -> None:
    async def work() -> None:
        async with Sandboxes(nodes.service) as hub:
            box = await nodes.create(hub)
            first = await box.run("echo once >> f; cat f", op_id="once")
            waiting = asyncio.create_task(_all(box))
            await asyncio.sleep(0.5)
            actor = (await nodes.service._nodes.of(box.id)).actor
            ray.kill(actor, no_restart=False)
            again = await box.run("echo once >> f; cat f", op_id="once")
            assert (again.stdout, again.replayed) == (first.stdout, True) == (b"once\n", True)
            kinds = [record["kind"] async for record in nodes.service.log(box.id)]
            assert kinds[:4] == ["create", "ready", "op.intent", "op.result"]
            with pytest.raises(SandboxError) as found:
                await asyncio.wait_for(waiting, 30)
            assert isinstance(found.value, OutcomeUnknown), found.value

    nodes.run(work())


async def _all(box: Sandbox) -> list[Any]:
    return [event async for event in box.stream("echo a; sleep 600")]


def test_from_another_process_and_without_async(nodes: Nodes) -> None:
    with sync.connect("ray://auto") as hub:
        box = hub.create("container", engine="process")
        nodes.used.append(box.id)
        assert box.run("echo here > note; echo sync").text == "sync\n"
        said = subprocess.run(
            [sys.executable, "-c", COMMAND, "sandbox", "run", "--url", "ray://auto", "--in", box.id, "--json",
             "--", "cat", "note"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert "here" in json.dumps(json.loads(said.stdout))
    with pytest.raises(NotFound), sync.connect("ray://auto") as hub:
        hub.attach(box.id).run("true")


@pytest.mark.skipif(os.geteuid() != 0, reason="runc: needs root")
def test_a_real_container(nodes: Nodes) -> None:
    async def work() -> None:
        async with Sandboxes(nodes.service) as hub:
            try:
                box = await nodes.create(hub, engine="runc", limits={"memory": "256M"})
            except Unsupported as error:
                pytest.skip(str(error))
            assert box.placed is not None
            assert box.placed.engine == "runc"
            assert (await box.run("cat /proc/1/comm; echo in")).text.endswith("in\n")

    nodes.run(work())


def test_a_node_that_dies_takes_its_sandboxes_alone(nodes: Nodes) -> None:
    async def work() -> None:
        async with Sandboxes(nodes.service) as hub:
            boxes = {await nodes.service.node(box.id): box for box in [await nodes.create(hub) for _ in range(3)]}
            lost = boxes.pop("three")
            nodes.cluster.remove_node(nodes.others["three"], allow_graceful=False)
            begin = time.monotonic()
            with pytest.raises(SandboxLost, match=f"Ray node three does not answer, and sandbox {lost.id}"):
                while time.monotonic() - begin < 60:  # the edge outlives its raylet for a moment
                    await lost.run("true")
                    await asyncio.sleep(0.1)
            assert time.monotonic() - begin < 60
            hub.release(lost)
            for box in boxes.values():
                assert (await box.run("echo on")).text == "on\n"
            assert {info["id"] for info in await hub.list()} == {box.id for box in boxes.values()}
            with pytest.raises(SandboxLost, match="three"):  # as a client that comes later hears it
                await hub.attach(lost.id)
            await boxes["two"].stop()
            assert await nodes.service.node((await nodes.create(hub)).id) == "two"

    nodes.run(work())
