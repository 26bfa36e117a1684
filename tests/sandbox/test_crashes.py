"""kill -9 of the server, the client and the guest at random moments: no command runs twice, no result is lost.

With engine `process`, commands die with the server; real engines are for `-m boxes`, and there they go on.
`CRASH_TRAJECTORIES=200` has as many examples of each.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from abyssal.sandbox.log.reader import operations, read_log
from tests.sandbox import crash_parts
from tests.sandbox.traces import traces

CONTEXT = crash_parts.CONTEXT
TRAJECTORIES = int(os.environ.get("CRASH_TRAJECTORIES", "30"))  # each takes about a second
SOME = st.integers(0, 250)
ENDS = ("unknown", "lost")  # what is told where nobody knows whether it happened


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which(program) is None, reason=f"{program} as root: apt-get install {program}"
    )


class Crashes(RuleBasedStateMachine):
    """A program that grows, a client that does it from its beginning again and again, and two that die."""

    engine = "process"
    grace: float | None = None
    work = "work"  # the sandbox's folder, below the engine's
    state: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="crash"))
        self.program: list[str] = []
        self.told: dict[int, Any] = {}
        self.server: BaseProcess | None = None
        self.kills = 0
        self.begin_server()

    def begin_server(self) -> None:
        arguments = (self.home, self.engine, self.grace, self.state)
        self.server = CONTEXT.Process(target=crash_parts.server, args=arguments)
        self.server.start()

    def begin_client(self) -> BaseProcess:
        process = CONTEXT.Process(target=crash_parts.client, args=(self.home, self.program, self.home / "told"))
        process.start()
        return process

    def kill(self, process: BaseProcess | None) -> None:
        assert process is not None
        process.kill()
        process.join()
        self.kills += 1

    def read_told(self) -> None:
        """What was told once is told the same way ever after."""
        notes = self.home / "told"
        for line in notes.read_text().splitlines(keepends=True) if notes.exists() else []:
            if not line.endswith("\n"):
                continue
            step, told = json.loads(line)
            assert self.told.setdefault(step, told) == told, f"step {step} told {self.told[step]!r}, then {told!r}"
        notes.unlink(missing_ok=True)

    @rule(op=st.sampled_from(["append", "slow", "two", "write", "read", "."]))
    def grow(self, op: str) -> None:
        self.program.append(op)

    @precondition(lambda self: self.program)
    @rule(after=SOME)
    def client_dies(self, after: int) -> None:
        client = self.begin_client()
        time.sleep(after / 1000)
        self.kill(client)
        self.read_told()

    @precondition(lambda self: self.program)
    @rule(after=SOME, again=SOME)
    def server_dies(self, after: int, again: int) -> None:
        client = self.begin_client()
        time.sleep(after / 1000)
        self.kill(self.server)
        self.begin_server()
        time.sleep(again / 1000)
        if again % 2:
            self.kill(client)
        else:
            client.join(60)
            assert client.exitcode == 0
        self.read_told()

    def teardown(self) -> None:
        try:
            if self.program:
                client = self.begin_client()
                client.join(60)
                assert client.exitcode == 0
                self.read_told()
                self.check()
        finally:
            self.end_server()
            shutil.rmtree(self.home)

    def end_server(self) -> None:
        self.kill(self.server)

    def check(self) -> None:
        (folder,) = (self.home / "boxes").iterdir()
        found = read_log(folder / "log")
        found.check()
        asked = [tuple(entry["place"]) for entry in operations(found.records)]
        assert len(asked) == len(set(asked)), "an operation was entered twice"
        box = self.home / "live" / folder.name
        if not box.exists():  # its guest died, and an edge has found that out and swept
            assert any(record.kind == "agent.lost" for record in found.records)
            return
        work = box / self.work  # not there where nothing was written
        for name, ops in (("f", ("append", "slow", "two")), ("g", ("two",))):
            path = work / name
            lines = [int(line) for line in path.read_text().splitlines()] if path.exists() else []
            assert len(lines) == len(set(lines)), f"{lines}: a command ran twice"
            known = [step for step, op in enumerate(self.program) if op in ops and self.told[step] not in ENDS]
            assert set(known) <= set(lines), f"{lines}: a result was told of what did not happen"
            assert lines == sorted(lines)
        for step, op in enumerate(self.program):
            if op == "write" and self.told[step] == "written":
                assert (work / f"w{step}").read_bytes() == str(step).encode() * 3000


class RealCrashes(Crashes):
    """The same, of an engine whose sandboxes outlive the server; and the guest dies too."""

    grace = 60.0
    prepared: ClassVar[dict[str, Path]] = {}  # state folders, by engine: what is built is the same in each example

    def __init__(self) -> None:
        if self.engine not in self.prepared:
            self.prepared[self.engine] = Path(tempfile.mkdtemp(prefix="crash-state"))
            atexit.register(shutil.rmtree, self.prepared[self.engine], ignore_errors=True)
        self.state = self.prepared[self.engine]
        super().__init__()
        probes = self.state / "probes.json"
        if probes.exists():
            shutil.copyfile(probes, self.home / "probes.json")

    def first(self, folder: Path) -> int:
        """Number of the guest's first process."""
        raise NotImplementedError

    @precondition(lambda self: self.program and self.kills)
    @rule(after=SOME)
    def guest_dies(self, after: int) -> None:
        client = self.begin_client()
        time.sleep(after / 1000)
        for folder in (self.home / "live").glob("*"):
            with suppress(OSError, ValueError):  # it is being made, or has been swept
                os.kill(self.first(folder), signal.SIGKILL)
        client.join(60)
        assert client.exitcode == 0
        self.read_told()

    def end_server(self) -> None:
        """In good order, as whatever is left of a sandbox now would be left for ever."""
        assert self.server is not None and self.server.pid is not None and self.state is not None
        if not self.program:  # nobody has waited for it to be there, and it has nothing
            self.kill(self.server)
            return
        boxes = [path.name for path in (self.home / "boxes").iterdir()]
        os.kill(self.server.pid, signal.SIGTERM)
        self.server.join(30)
        shutil.copyfile(self.home / "probes.json", self.state / "probes.json")
        assert self.server.exitcode == 0
        for box_id in boxes:
            assert traces(box_id) == []


class BwrapCrashes(RealCrashes):
    """Containers without a runtime of their own."""

    engine, work = "bwrap", "upper/work"

    def first(self, folder: Path) -> int:
        return int(json.loads((folder / "agent.json").read_text())["more"]["first"][0])


class RuncCrashes(RealCrashes):
    """Containers of a runtime."""

    engine, work = "runc", "disk/upper/work"

    def first(self, folder: Path) -> int:
        return int((folder / "pid").read_text())


for machine in (Crashes, BwrapCrashes, RuncCrashes):
    machine.TestCase.settings = settings(
        max_examples=TRAJECTORIES, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
TestCrashes = Crashes.TestCase
TestCrashes.pytestmark = [pytest.mark.timeout(1800)]
TestBwrapCrashes = BwrapCrashes.TestCase
TestBwrapCrashes.pytestmark = [pytest.mark.boxes, pytest.mark.timeout(7200), needs("bwrap")]
TestRuncCrashes = RuncCrashes.TestCase
TestRuncCrashes.pytestmark = [pytest.mark.boxes, pytest.mark.timeout(7200), needs("runc")]
