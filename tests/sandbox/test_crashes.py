"""kill -9 of the server and of the client at random moments: no command runs twice, no result is lost."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from abyssal.sandbox.log.reader import operations, read_log
from tests.sandbox import crash_parts

CONTEXT = crash_parts.CONTEXT
TRAJECTORIES = int(os.environ.get("CRASH_TRAJECTORIES", "30"))  # each takes about a second
SOME = st.integers(0, 250)


class Crashes(RuleBasedStateMachine):
    """A program that grows, a client that does it from its beginning again and again, and two that die."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="crash"))
        self.program: list[str] = []
        self.told: dict[int, Any] = {}
        self.server: BaseProcess | None = None
        self.kills = 0
        self.begin_server()

    def begin_server(self) -> None:
        self.server = CONTEXT.Process(target=crash_parts.server, args=(self.home,))
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
            self.kill(self.server)
            shutil.rmtree(self.home)

    def check(self) -> None:
        (folder,) = (self.home / "boxes").iterdir()
        work = self.home / "live" / folder.name / "work"
        for name, ops in (("f", ("append", "slow", "two")), ("g", ("two",))):
            path = work / name
            lines = [int(line) for line in path.read_text().splitlines()] if path.exists() else []
            assert len(lines) == len(set(lines)), f"{lines}: a command ran twice"
            known = [step for step, op in enumerate(self.program) if op in ops and self.told[step] != "unknown"]
            assert set(known) <= set(lines), f"{lines}: a result was told of what did not happen"
            assert lines == sorted(lines)
        for step, op in enumerate(self.program):
            if op == "write" and self.told[step] == "written":
                assert (work / f"w{step}").read_bytes() == str(step).encode() * 3000
        found = read_log(folder / "log")
        found.check()
        asked = [tuple(entry["place"]) for entry in operations(found.records)]
        assert len(asked) == len(set(asked)), "an operation was entered twice"


Crashes.TestCase.settings = settings(
    max_examples=TRAJECTORIES, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestCrashes = Crashes.TestCase
TestCrashes.pytestmark = [pytest.mark.timeout(1800)]
