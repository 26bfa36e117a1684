"""`abyssal sandbox` as a user calls it, against a local edge that starts by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from abyssal.cli.main import main; main()", "sandbox", *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("edge")
    yield str(folder)
    command("stop", "--edge", "--home", str(folder))


def test_run(home: str) -> None:
    unsafe = ("--home", home, "--allow-unsafe", "--engine", "process")
    found = command("run", *unsafe, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (found.returncode, found.stdout) == (3, "out\n")
    assert "err\n" in found.stderr
    assert "this was no sandbox" in found.stderr
    found = command("run", *unsafe, "--json", "--env", "A=b", "--substrate", "function", "--", "sh", "-c", "echo $A")
    told = json.loads(found.stdout)
    assert {"substrate", "exit_code", "stdout", "stderr", "start_ms", "wall_ms"} <= set(told)
    assert (told["substrate"], told["exit_code"], told["stdout"]) == ("function", 0, "b\n")
    assert told["boundary"] == "process"
    found = command("run", *unsafe, "--timeout", "0.2", "--", "sleep", "30")
    assert found.returncode == 137
    assert command("run", *unsafe, "--substrate", "box", "--", "true").returncode == 2
    assert command("run", *unsafe, "--env", "A", "--", "true").returncode == 2
    found = command("run", *unsafe, "--boundary", "vm-hardware", "--", "true")
    assert found.returncode == 1
    assert "vm-hardware is required" in found.stderr
    found = command("run", *unsafe, "--", "no-such-program")
    assert found.returncode == 1
    assert "no-such-program" in found.stderr


def test_keep_list_log_replay_stop(home: str) -> None:
    where = ("--home", home)
    found = command(
        "run", *where, "--allow-unsafe", "--engine", "process", "--keep", "--", "sh", "-c", "echo kept | tee f"
    )
    sandbox = found.stderr.splitlines()[0]
    assert command("run", *where, "--in", sandbox, "--", "cat", "f").stdout == "kept\n"
    listed = json.loads(command("ls", *where, "--json").stdout)["sandboxes"]
    assert [info["id"] for info in listed] == [sandbox]
    assert sandbox in command("ls", *where).stdout
    shown = command("log", sandbox, *where)
    assert "echo kept | tee f" in shown.stdout
    assert "| kept" in shown.stdout
    entries = [json.loads(line) for line in command("log", sandbox, *where, "--json").stdout.splitlines()]
    assert [entry["req"]["op"] for entry in entries] == ["exec", "exec"]
    replayed = json.loads(command("replay", sandbox, *where, "--json").stdout)
    assert (replayed["equal"], replayed["different"]) == (2, 0)
    assert command("replay", sandbox, *where).returncode == 0
    child = command("replay", sandbox, *where, "--branch", "3").stdout.strip()
    assert command("run", *where, "--in", child, "--", "cat", "f").stdout == "kept\n"
    assert command("stop", sandbox, child, *where).returncode == 0
    assert not json.loads(command("ls", *where, "--json").stdout)["sandboxes"]
    assert command("log", sandbox, *where).returncode == 0
    assert command("stop", *where).returncode == 2


def test_doctor_and_refusals(tmp_path: Path) -> None:
    only = ("--home", str(tmp_path), "--allow-unsafe", "--engine", "process")
    told = json.loads(command("doctor", *only, "--json").stdout)
    assert set(told["substrates"]) == {"function", "container", "microvm", "vm"}
    assert [engine["ok"] for engine in told["engines"] if engine["name"] == "process"] == [True]
    assert "process" in command("doctor", *only).stdout
    assert "no engine is called" in command("doctor", "--engine", "none", "--home", str(tmp_path)).stderr
    assert "choose from pool" in command("install", "--engine", "none").stderr
    found = command("serve", "--host", "0.0.0.0", "--home", str(tmp_path))
    assert found.returncode == 2
    assert "can be reached from elsewhere" in found.stderr
    assert command("serve", "--project", "bad", "--home", str(tmp_path)).returncode == 2
