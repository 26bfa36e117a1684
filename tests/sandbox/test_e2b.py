"""E2B's own client against our server, and which of its defaults differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.sandbox.serving import Served

e2b = pytest.importorskip("e2b")
TOKEN = "e2b_" + "0" * 40


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("edge"), "--project", f"team={TOKEN}") as server:
        yield server


@pytest.fixture
def options(served: Served) -> dict[str, Any]:
    return {"api_key": TOKEN, "api_url": served.url, "sandbox_url": served.url, "http_version": "1.1", "retries": 0}


@pytest.fixture
def sandbox(options: dict[str, Any]) -> Iterator[Any]:
    sandbox = e2b.Sandbox.create(timeout=120, metadata={"job": "e"}, envs={"A": "1"}, **options)
    yield sandbox
    sandbox.kill()


def test_commands(sandbox: Any) -> None:
    result = sandbox.commands.run("echo $A $B; echo err >&2", envs={"B": "2"})
    assert (result.exit_code, result.stdout, result.stderr) == (0, "1 2\n", "err\n")
    with pytest.raises(e2b.CommandExitException) as caught:
        sandbox.commands.run("echo out; exit 7")
    assert (caught.value.exit_code, caught.value.stdout) == (7, "out\n")
    seen: list[str] = []
    sandbox.commands.run("echo one; echo two", on_stdout=seen.append)
    assert "".join(seen) == "one\ntwo\n"
    handle = sandbox.commands.run("read x; echo got $x", background=True, stdin=True)
    assert [process.pid for process in sandbox.commands.list()] == [handle.pid]
    sandbox.commands.send_stdin(handle.pid, "this\n")
    assert handle.wait().stdout == "got this\n"
    handle = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "all")
    sandbox.commands.close_stdin(handle.pid)
    assert sandbox.commands.connect(handle.pid).wait().stdout == "all"
    handle = sandbox.commands.run("sleep 60", background=True)
    assert sandbox.commands.kill(handle.pid)
    with pytest.raises(e2b.CommandExitException):
        handle.wait()
    assert not sandbox.commands.kill(handle.pid)
    assert not sandbox.commands.kill(99999)


def test_files(sandbox: Any) -> None:
    info = sandbox.files.write("d/f.txt", "text")
    assert info.name == "f.txt"
    assert sandbox.files.read("d/f.txt") == "text"
    data = bytes(range(256)) * 300
    sandbox.files.write("d/b", data)
    assert bytes(sandbox.files.read("d/b", format="bytes")) == data
    assert sorted(entry.name for entry in sandbox.files.list("d")) == ["b", "f.txt"]
    assert sandbox.files.exists("d/b")
    assert not sandbox.files.exists("d/none")
    assert sandbox.files.get_info("d/b").size == len(data)
    assert sandbox.files.make_dir("new")
    assert not sandbox.files.make_dir("new")
    assert sandbox.files.rename("d/b", "new/c").name == "c"
    sandbox.files.remove("d")
    assert not sandbox.files.exists("d")
    with pytest.raises(e2b.FileNotFoundException):
        sandbox.files.read("none")


def test_terminal(sandbox: Any) -> None:
    handle = sandbox.pty.create(e2b.PtySize(rows=21, cols=61), timeout=20)
    sandbox.pty.resize(handle.pid, e2b.PtySize(rows=22, cols=62))
    sandbox.pty.send_stdin(handle.pid, b"stty size; exit\n")
    seen: list[bytes] = []
    handle.wait(on_pty=seen.append)
    assert b"22 62" in b"".join(seen)


def test_life(sandbox: Any, options: dict[str, Any]) -> None:
    assert sandbox.is_running()
    assert sandbox.get_info().metadata == {"job": "e"}
    sandbox.set_timeout(100)
    assert sandbox.sandbox_id in [info.sandbox_id for info in e2b.Sandbox.list(**options).next_items()]
    again = e2b.Sandbox.connect(sandbox.sandbox_id, **options)
    assert again.commands.run("echo $A").stdout == "1\n"
    other = e2b.Sandbox.create(**options)
    assert other.kill()
    assert not other.kill()
    with pytest.raises(e2b.AuthenticationException):
        e2b.Sandbox.create(**{**options, "api_key": "e2b_" + "1" * 40})


def test_what_differs(sandbox: Any) -> None:
    """Of E2B's defaults: the folder, and that a sandbox reaches nobody unless the host permits it."""
    assert sandbox.commands.run("basename $PWD").stdout == "work\n"  # E2B: /home/user
    with pytest.raises(Exception, match="open"):
        e2b.Sandbox.create(allow_internet_access=True, **{"api_key": TOKEN, **_where(sandbox)})


def _where(sandbox: Any) -> dict[str, Any]:
    config = sandbox.connection_config
    return {"api_url": config.api_url, "sandbox_url": config.api_url, "http_version": "1.1", "retries": 0}
