"""The SDK without async."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from abyssal.sandbox import sync
from abyssal.sandbox.api import Exit, Stdout
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.process import ProcessEngine
from abyssal.sandbox.errors import NotFound, Unsupported
from tests.sandbox.serving import Served


def test_over_http(tmp_path: Path) -> None:
    with Served(tmp_path) as server, sync.connect(server.url) as hub:
        sb = hub.create("container", labels={"job": "s"})
        assert sb.run("echo hi").text == "hi\n"
        events = list(sb.stream("echo a; echo b"))
        assert b"".join(event.data for event in events if isinstance(event, Stdout)) == b"a\nb\n"
        assert isinstance(events[-1], Exit)
        sb.files.write("f", b"1")
        assert sb.files.read("f") == b"1"
        s = sb.session()
        s.run("cd /")
        assert s.run("pwd").text == "/\n"
        (kid,) = sb.fork(1)
        assert kid.files.read("f") == b"1"
        running = sb.start("cat", stdin=True)
        running.write(b"x", end=True)
        assert running.wait().stdout == b"x"
        for event in sb.stream("yes"):  # left early
            assert event
            break
        with pytest.raises(NotFound):
            sb.files.read("none")
        again = hub.attach(sb.id, stream="main")
        assert again.run("echo hi").replayed
        snap = sb.snapshot()
        assert hub.create("container", snapshot=snap).files.read("f") == b"1"


def test_over_an_edge_in_this_process(tmp_path: Path) -> None:
    loop = sync.Loop()
    edge = loop.run(Edge.open(tmp_path, [ProcessEngine(allow_unsafe=True)]))
    with sync.over(loop, edge) as hub:
        sb = hub.create("container")
        assert sb.run(["echo", "hi"]).text == "hi\n"
        assert {"run", "stream", "files", "session", "tty", "fork", "log"} <= set(dir(sb))
        assert next(sb.log())["kind"] == "create"
        sb.stop()
        loop.run(edge.close())


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not there
    with pytest.raises(Unsupported, match=r"pip install 'abyssal\[dist\]'"), sync.connect("ray://auto"):
        pass
