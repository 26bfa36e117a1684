"""Functions in warm containers: each call gets a Python that has started already, in a container of its own.

A worker serves one call; then its container goes, with every file, process and shared memory in it, so nothing can be
left for the next call (sandbox.md 3, rule 6). Meanwhile another one is made. Calls are commands of two forms:

    ("python3", "-c", SOURCE, ARGUMENT, ...)      source text
    ("call", "MODULE:FUNCTION", JSON LIST)        the result is printed as JSON
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from abyssal.base.errors import AbyssalError
from abyssal.sandbox import packages
from abyssal.sandbox.api import (
    Box,
    Command,
    Engine,
    Exit,
    Feature,
    Files,
    Network,
    Placed,
    Probe,
    Process,
    ProcessEvent,
    Spec,
    Stdout,
    Substrate,
    Usage,
)
from abyssal.sandbox.engines import pool_worker
from abyssal.sandbox.engines.calls import NoFiles, as_call
from abyssal.sandbox.engines.placing import check
from abyssal.sandbox.errors import AgentLost, SandboxError, Unsupported

WARM = 2  # workers that wait, for each box
READY_S = 30.0
AFTER_S = 0.01  # in which a result is kept and told
WORKER = Path(pool_worker.__file__)


class PoolEngine:
    """See `Engine`.

    Args:
        state: folder of the engine.
        inner: runs the containers.
    """

    name = "pool"
    substrates: tuple[Substrate, ...] = ("function",)
    features: frozenset[Feature] = frozenset({"stdin", "background"})

    def __init__(self, state: Path, inner: Engine):
        self.state, self._inner = state, inner
        self._placed: Placed | None = None

    async def probe(self) -> Probe:
        probe = await self._inner.probe()
        if not probe.ok or probe.placed is None:
            return probe
        self._placed = replace(probe.placed, engine=self.name)
        begin = time.monotonic()
        folder = self.state / "pool-probe"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            box = await self.create(f"pool-probe-{time.monotonic_ns():x}", Spec("function"), folder)
            try:
                process = await box.start(Command(("python3", "-c", "print(6 * 7)"), timeout=10))
                seen = [event async for event in process.events()]
            finally:
                await box.stop()
        except (AbyssalError, OSError) as error:
            return Probe(False, None, f"a trial call did not run: {error}")
        if not isinstance(seen[0], Stdout) or seen[0].data != b"42\n":
            return Probe(False, None, f"a trial call answered {seen!r}", packages.remedy(self.name))
        return Probe(True, self._placed, f"a call was answered in {time.monotonic() - begin:.2f} s")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        if self._placed is None:
            probe = await self._inner.probe()
            if probe.placed is None:
                raise Unsupported(f"engine pool needs engine {self._inner.name}, which does not run: {probe.detail}")
            self._placed = replace(probe.placed, engine=self.name)
        check(self.name, self.substrates, self.features, self._placed, spec)
        box = PoolBox(box_id, self._placed, self.features, self._inner, spec, folder)
        try:
            await box.warm()
        except BaseException:
            await box.stop()
            raise
        return box

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        return []  # the containers are the inner engine's to sweep


class _Worker:
    """A Python that waits in a container."""

    def __init__(self, box: Box, process: Process, events: AsyncIterator[ProcessEvent]):
        self.box, self.process, self.events = box, process, events


class PoolBox:
    """See `Box`: a place that calls go to."""

    def __init__(
        self, box_id: str, placed: Placed, features: frozenset[Feature], inner: Engine, spec: Spec, folder: Path
    ):
        self.id, self.placed, self.features = box_id, placed, features
        self.files = cast(Files, NoFiles())
        self._inner, self._spec, self._folder = inner, spec, folder
        self._ready: asyncio.Queue[_Worker | SandboxError] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._boxes: dict[str, Box] = {}
        self._count = 0
        self._made = self._wanted = 0  # workers that are being made, calls that wait for one
        self._stopped = False

    async def warm(self) -> None:
        """Have workers wait; returns when the first one does."""
        self._top_up(WARM)
        first = await self._ready.get()
        if isinstance(first, SandboxError):
            raise first
        self._ready.put_nowait(first)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _top_up(self, spare: int) -> None:
        """Have a worker made for each call that waits, and some for those to come; no more, whoever asks."""
        while not self._stopped and self._ready.qsize() + self._made < self._wanted + spare:
            self._made += 1
            self._spawn(self._make())

    async def _make(self) -> None:
        self._count += 1
        box_id = f"{self.id}-{self._count}"
        folder = self._folder / box_id
        try:
            folder.mkdir(parents=True, exist_ok=True)
            box = await self._inner.create(box_id, replace(self._spec, substrate="container"), folder)
            self._boxes[box_id] = box
            worker = ("/usr/bin/python3", "-S", "-c", WORKER.read_text())
            process = await box.start(Command(worker, stdin=True))
            events = process.events()
            async with asyncio.timeout(READY_S):
                first = await anext(events)
            if not isinstance(first, Stdout) or first.data != b"\x06":
                raise Unsupported(f"image {self._spec.image!r} has no /usr/bin/python3 that starts: {first!r}")
            self._ready.put_nowait(_Worker(box, process, events))
        except TimeoutError:
            self._ready.put_nowait(AgentLost("unknown", f"a worker did not start within {READY_S:g} s"))
        except SandboxError as error:
            self._ready.put_nowait(error)
        except (AbyssalError, OSError) as error:
            self._ready.put_nowait(AgentLost("unknown", f"a worker could not be made: {error}"))
        finally:
            self._made -= 1

    async def start(self, command: Command) -> Process:
        if self._stopped:
            raise AgentLost("killed", "the sandbox was stopped")
        text = json.dumps(as_call(command, self._spec)).encode()
        self._wanted += 1
        try:
            self._top_up(0)  # what is to spare is made when the call is over
            worker = await self._ready.get()
        finally:
            self._wanted -= 1
        if isinstance(worker, SandboxError):
            raise worker
        call = PoolProcess(worker.process, worker.events, command, lambda: self._spawn(self._replace(worker.box)))
        await worker.process.write(b"%08x" % len(text) + text)
        if not command.stdin:
            await worker.process.close_stdin()
        return call

    async def _replace(self, box: Box) -> None:
        """Another worker for one that has served; made later, so as not to be in the way of the result."""
        await asyncio.sleep(AFTER_S)
        await self._discard(box)
        self._top_up(WARM)

    async def _discard(self, box: Box) -> None:
        self._boxes.pop(box.id, None)
        await box.stop()

    async def pause(self) -> None:
        raise Unsupported("functions cannot be paused: choose substrate container")

    async def resume(self) -> None:
        raise Unsupported("functions cannot be paused: choose substrate container")

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        raise Unsupported("functions keep nothing: choose substrate container")

    async def fork(self, ids: Sequence[str]) -> Sequence[Box]:
        raise Unsupported("functions keep nothing: choose substrate container")

    async def set_network(self, network: Network) -> None:
        if network != self._spec.network:
            raise Unsupported("functions keep the network that they were made with")

    async def usage(self) -> Usage:
        return Usage()

    async def stop(self) -> None:
        self._stopped = True
        while self._tasks:  # a call that ends meanwhile adds one
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for box in list(self._boxes.values()):
            await self._discard(box)


class PoolProcess:
    """See `Process`: one call; its container goes at its end."""

    def __init__(
        self, inner: Process, events: AsyncIterator[ProcessEvent], command: Command, discard: Callable[[], None]
    ):
        self.pid = inner.pid
        self._inner, self._events, self._discard = inner, events, discard
        self._begin = time.monotonic()
        self._timed_out = False
        self._clock = asyncio.create_task(self._end_at(command.timeout)) if command.timeout else None
        self.write, self.close_stdin, self.signal = inner.write, inner.close_stdin, inner.signal

    async def _end_at(self, timeout: float) -> None:
        await asyncio.sleep(timeout)
        self._timed_out = True
        with suppress(AgentLost):
            await self._inner.signal(9)

    async def events(self) -> AsyncIterator[ProcessEvent]:
        try:
            async for event in self._events:
                if isinstance(event, Exit):
                    spent = round((time.monotonic() - self._begin) * 1000)
                    yield replace(event, timed_out=self._timed_out, duration_ms=spent)
                elif isinstance(event, Stdout):
                    yield Stdout(event.data, event.offset - 1)  # the worker's own mark came first
                else:
                    yield event
        finally:
            if self._clock is not None:
                self._clock.cancel()
            self._discard()

    async def resize(self, rows: int, columns: int) -> None:
        raise Unsupported("functions have no terminal: choose substrate container")
