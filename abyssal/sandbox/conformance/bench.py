"""The bench that checks work on: boxes of one engine, and commands in them."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.sandbox.api import MIB, Box, Command, Engine, Exit, Feature, Limits, Process, Spec, Stderr, Stdout, shell

SMALL = Limits(memory=128 * MIB, pids=64, disk=64 * MIB)


class Failed(AssertionError):  # noqa: N818
    """An engine does not do what it has to."""


def expect(holds: object, what: str, *seen: object) -> None:
    """Fail unless something holds, with what was seen."""
    if not holds:
        raise Failed(f"{what}; seen: {', '.join(map(repr, seen))}" if seen else what)


@dataclass(frozen=True)
class Outcome:
    """A command's output, whole, and how it ended."""

    stdout: str
    stderr: str
    exit: Exit

    @property
    def code(self) -> int:
        """Its exit code."""
        return self.exit.code


async def collect(process: Process) -> Outcome:
    """Read a process to its end."""
    parts: dict[type, list[bytes]] = {Stdout: [], Stderr: []}
    async for event in process.events():
        if isinstance(event, Exit):
            out, err = (b"".join(parts[kind]).decode(errors="replace") for kind in (Stdout, Stderr))
            return Outcome(out, err, event)
        parts[type(event)].append(event.data)
    raise Failed("a process's events ended without Exit")


@dataclass
class Bench:
    """An engine to be checked.

    Attributes:
        engine: it.
        folder: where boxes get theirs.
        spec: what boxes are asked for unless a check needs something else.
    """

    engine: Engine
    folder: Path
    spec: Spec = field(default_factory=lambda: Spec("container", limits=SMALL))
    made: list[str] = field(default_factory=list)  # ids of boxes

    @asynccontextmanager
    async def box(self, **changes: Any) -> AsyncIterator[Box]:
        """A box that is stopped in the end."""
        settings = {name: getattr(self.spec, name) for name in self.spec.__dataclass_fields__} | changes
        box_id = f"check-{uuid.uuid4().hex[:12]}"
        self.made.append(box_id)
        folder = Path(tempfile.mkdtemp(prefix="box.", dir=self.folder))
        try:
            box = await self.engine.create(box_id, Spec(**settings), folder)
            try:
                yield box
            finally:
                await box.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


async def run(box: Box, command: str | tuple[str, ...], **settings: Any) -> Outcome:
    """Run a command; text is given to the shell. Nothing takes longer than half a minute unless it says so."""
    argv = shell(command) if isinstance(command, str) else command
    return await collect(await box.start(Command(argv, **{"timeout": 30.0, **settings})))


async def answers(box: Box) -> None:
    """The box still works."""
    outcome = await run(box, ("/bin/echo", "here"))
    expect(outcome.stdout == "here\n" and outcome.code == 0, "the box does not answer any more", outcome)


Action = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True)
class Check:
    """One check: its name, what an engine must be able to for it, and what is done."""

    name: str
    action: Action
    needs: frozenset[Feature] = frozenset()


class Checks:
    """A list that functions are put on."""

    def __init__(self) -> None:
        self.all: list[Check] = []

    def __call__(self, *needs: Feature) -> Callable[[Action], Action]:
        """A decorator: this function is a check."""

        def put(action: Action) -> Action:
            name = getattr(action, "__name__", "check")
            self.all.append(Check(name, action, frozenset(needs)))
            return action

        return put


def python(source: str, *arguments: str) -> tuple[str, ...]:
    """The argv of a Python program given as text."""
    return ("/usr/bin/python3", "-c", source, *arguments)
