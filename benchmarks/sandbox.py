"""What a sandbox costs on this host, beside the same done by hand, and against the bars of sandbox.md 10.

    python benchmarks/sandbox.py [--engine runc bwrap] [--repeat 20] [--out benchmarks/results/sandbox.json]

For every engine whose probe passes, through the SDK over an edge in this process (so with the log, which is durable
before each reply):

- start: `create` to the end of a first `true`, then `stop`; nothing is kept warm but what the engine keeps itself.
- command: `true` in a sandbox that is there. Every call of a function gets a worker of its own; half a second passes
  between calls, in which the pool makes new ones. `sustained` is the same without a pause.
- write, read: a file of 32 MiB through `files`.
- fork: one copy, to the end of a `true` in it (engines that fork).
- checkpoint, restore: a snapshot, with memory where the engine keeps it (containers, gVisor's too, keep their disk
  alone), and a sandbox that starts from it, to the end of a `true` (engines that start from snapshots).
- cold: a start of a kind that no template is kept of, which is then made (machines).

Peers, in turns with them in the same run: `runc run` on a bundle that holds one static program, made by `runc spec`;
`bwrap` with this host's root; `runc exec`; and a plain subprocess, which is the least that starting a program takes.
The limit of files is writing and reading them here.

Then the log alone: 1,000 commands are in a log, a client comes back and asks for all of them again, and gets answers
from it without running any; and a command's time with the log less that of the same box without.

Medians, and the 99th percentile as far as the repeats show one. What this does not show: many at once, or a host with
hardware virtualisation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.sandbox.api import Command, Engine, Exit, Limits, Restores, Spec, Substrate
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.registry import installed
from abyssal.sandbox.engines.wasm import WasmEngine
from abyssal.sandbox.errors import Unsupported
from abyssal.sandbox.hub import Sandboxes
from abyssal.sandbox.sandbox import Sandbox

HERE = Path(__file__).parent
FILE = 32 << 20
OPERATIONS = 1000
# milliseconds of sandbox.md 10: engine -> measure -> (median, 99th percentile or None)
BARS: dict[str, dict[str, tuple[float, float | None]]] = {
    "runc": {"start": (80, 250), "command": (10, None)},
    "bwrap": {"command": (10, None)},
    "pool": {"command": (10, None)},
    "wasm": {"command": (60, None)},
    "gvisor": {"start": (300, None), "command": (10, None), "checkpoint": (200, None), "restore": (400, None)},
    "qemu-microvm": {"start": (400, None), "command": (10, None), "cold": (4000, None)},
}
LOG_MS, FORWARD_S = 3.0, 1.0
Row = dict[str, Any]


def spread(seconds: list[float]) -> Row:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": round(statistics.median(ordered) * 1e3, 2), "p99_ms": round(last * 1e3, 2), "n": len(ordered)}


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    begin = time.perf_counter()
    await work()
    return time.perf_counter() - begin


async def program(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


class Peers:
    """The same by hand: what can be run here, by name."""

    def __init__(self, folder: Path):
        self.by_name: dict[str, Callable[[], Awaitable[object]]] = {"subprocess": lambda: program("true")}
        self._container: str | None = None
        if shutil.which("bwrap"):
            self.by_name["bwrap, by hand"] = lambda: program(
                "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "true"
            )
        if shutil.which("runc") and shutil.which("busybox") and os.geteuid() == 0:
            self._runc(folder)

    def _runc(self, folder: Path) -> None:
        root, self._number = ["runc", "--root", str(folder / "state")], 0
        for name, arguments in (("once", ["true"]), ("stays", ["sleep", "100000"])):
            bundle = folder / name
            programs = bundle / "rootfs" / "bin"
            programs.mkdir(parents=True)
            shutil.copy2(str(shutil.which("busybox")), programs / "true")
            shutil.copy2(str(shutil.which("busybox")), programs / "sleep")
            subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
            config = json.loads((bundle / "config.json").read_text())
            config["mounts"] = [m for m in config["mounts"] if m["type"] != "cgroup"]  # some hosts lack it in places
            config["process"] |= {"terminal": False, "args": arguments}
            (bundle / "config.json").write_text(json.dumps(config))
        tried = subprocess.run([*root, "run", "-b", str(folder / "once"), "try"], capture_output=True)
        if tried.returncode:
            print(f"runc by hand does not run here: {tried.stderr.decode().strip()}", flush=True)
            return
        self._container = f"abyssal-peer-{os.getpid()}"
        self._root = root
        subprocess.run([*root, "run", "-d", "-b", str(folder / "stays"), self._container], check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

        async def run() -> None:
            self._number += 1
            await program(*root, "run", "-b", str(folder / "once"), f"{self._container}-{self._number}")

        self.by_name["runc run, by hand"] = run
        self.by_name["runc exec, by hand"] = lambda: program(*root, "exec", str(self._container), "true")

    def close(self) -> None:
        if self._container is not None:
            subprocess.run([*self._root, "delete", "--force", self._container], check=True)


async def of_engine(hub: Sandboxes, engine: Engine, substrate: Substrate, repeat: int) -> Row:
    """Everything that one engine can do."""
    call = substrate == "function"
    command = ["python3", "-c", "pass"] if call else ["true"]
    starts: list[float] = []
    commands: list[float] = []
    for number in range(repeat):
        begin = time.perf_counter()
        box = await hub.create(substrate, engine=engine.name)
        result = await box.run(command)
        starts.append(time.perf_counter() - begin)
        if result.exit_code:
            raise SystemExit(f"{engine.name}: {result.stderr.decode(errors='replace')}")
        if number < repeat - 1:
            await box.stop()
    for _ in range(3 * repeat):
        await asyncio.sleep(0.5 if call else 0)
        commands.append(await timed(lambda: box.run(command)))
    row: Row = {"substrate": substrate, "start": spread(starts), "command": spread(commands)}
    if call:
        row["sustained"] = spread([await timed(lambda: box.run(command)) for _ in range(3 * repeat)])
    else:
        data = os.urandom(FILE)
        written = min([await timed(lambda: box.files.write("/work/file", data)) for _ in range(3)])
        read = min([await timed(lambda: box.files.read("/work/file")) for _ in range(3)])
        row["files"] = {"write_mb_s": round(FILE / written / 1e6, 1), "read_mb_s": round(FILE / read / 1e6, 1)}
    if "fork" in engine.features:

        async def copy() -> None:
            (twin,) = await box.fork(1)
            await twin.run(command)
            await twin.stop()

        row["fork"] = spread([await timed(copy) for _ in range(max(repeat // 4, 2))])
    if "snapshot" in engine.features:
        row |= await of_snapshots(hub, engine, box, max(repeat // 4, 2))
    await box.stop()
    if "memory-snapshot" in engine.features:

        async def cold(number: int) -> None:
            odd = await hub.create(substrate, engine=engine.name, limits=Limits(memory=(514 + 2 * number) << 20))
            await odd.run(command)
            await odd.stop()

        row["cold"] = spread([await timed(lambda number=number: cold(number)) for number in range(3)])  # type: ignore[misc]
    return row


async def of_snapshots(hub: Sandboxes, engine: Engine, box: Sandbox, repeat: int) -> Row:
    """Snapshots of a sandbox, and starts from them."""
    kept: list[float] = []
    restored: list[float] = []
    for _ in range(repeat):
        begin = time.perf_counter()
        snapshot = await box.snapshot(memory="memory-snapshot" in engine.features)
        kept.append(time.perf_counter() - begin)
        if isinstance(engine, Restores):
            begin = time.perf_counter()
            twin = await hub.create(engine.substrates[0], engine=engine.name, snapshot=snapshot)
            await twin.run(["true"])
            restored.append(time.perf_counter() - begin)
            await twin.stop()
    return {"checkpoint": spread(kept), **({"restore": spread(restored)} if restored else {})}


def files_here(folder: Path) -> Row:
    """What this host's own disk does with the same file."""
    data, path = os.urandom(FILE), folder / "file"

    def write() -> float:
        begin = time.perf_counter()
        path.write_bytes(data)
        return time.perf_counter() - begin

    def read() -> float:
        begin = time.perf_counter()
        path.read_bytes()
        return time.perf_counter() - begin

    written, fetched = min(write() for _ in range(3)), min(read() for _ in range(3))
    return {"write_mb_s": round(FILE / written / 1e6, 1), "read_mb_s": round(FILE / fetched / 1e6, 1)}


async def of_log(hub: Sandboxes, engine: Engine, folder: Path, repeat: int) -> Row:
    """What the log adds to a command, and how fast a client that comes back is answered from it."""
    folder.mkdir()
    bare = await engine.create("bench-bare", Spec("container"), folder)

    async def run() -> None:
        process = await bare.start(Command(["true"]))
        async for event in process.events():
            if isinstance(event, Exit):
                return

    box = await hub.create("container", engine=engine.name)
    alone, logged = [], []
    for _ in range(3 * repeat):
        alone.append(await timed(run))
        logged.append(await timed(lambda: box.run(["true"])))
    await bare.stop()
    first = await hub.attach(box.id, stream="bench")
    for number in range(OPERATIONS):
        await first.run(["echo", str(number)])
    again = await hub.attach(box.id, stream="bench")
    begin = time.perf_counter()
    for number in range(OPERATIONS):
        result = await again.run(["echo", str(number)])
        assert result.text.strip() == str(number)
    forward = time.perf_counter() - begin
    await box.stop()
    added = statistics.median(logged) - statistics.median(alone)
    return {"engine": engine.name, "alone": spread(alone), "logged": spread(logged),
            "added_ms": round(added * 1e3, 2), "bar_added_ms": LOG_MS,
            "forward_s": round(forward, 3), "operations": OPERATIONS, "bar_forward_s": FORWARD_S}  # fmt: skip


async def measure(names: list[str], repeat: int, folder: Path) -> Row:
    engines = installed(folder / "engines", names=names)
    edge = await Edge.open(folder / "home", engines)
    peers = Peers(folder)
    rows: dict[str, Row] = {}
    by_hand: dict[str, list[float]] = {name: [] for name in peers.by_name}
    log: Row | None = None
    try:
        async with Sandboxes(edge) as hub:
            for engine in engines:
                if isinstance(engine, WasmEngine):  # compiled once for each release; longer than a probe may take
                    with suppress(Unsupported):
                        await asyncio.to_thread(lambda engine=engine: engine.compiled)  # type: ignore[misc]
                probe = await edge.placement.probe(engine)
                if not probe.ok:
                    print(f"{engine.name} does not run here: {probe.detail}", flush=True)
                    continue
                rows[engine.name] = await of_engine(hub, engine, engine.substrates[0], repeat)
                print(f"{engine.name:14s} {json.dumps(rows[engine.name])}", flush=True)
                for name, run in peers.by_name.items():
                    by_hand[name] += [await timed(run) for _ in range(repeat)]
                if log is None and "container" in engine.substrates:
                    log = await of_log(hub, engine, folder / "bare", repeat)
                    print(f"log            {json.dumps(log)}", flush=True)
    finally:
        peers.close()
        await edge.close()
    hand = {name: spread(seconds) for name, seconds in by_hand.items() if seconds}
    return {"engines": rows, "by_hand": hand, "files_here": files_here(folder), "log": log}


def judged(found: Row) -> list[Row]:
    """Each bar, what was measured, and their ratio: above 1 where the bar is met."""
    rows = []
    for engine, bars in BARS.items():
        for what, (middle, last) in bars.items():
            if measured := found["engines"].get(engine, {}).get(what):
                for name, bar in (("p50_ms", middle), ("p99_ms", last)):
                    if bar is not None:
                        rows.append({"engine": engine, "what": what, "percentile": name[:3], "bar_ms": bar,
                                     "measured_ms": measured[name],
                                     "ratio": round(bar / max(measured[name], 1e-3), 2)})  # fmt: skip
    return rows


def draw(found: Row, path: Path) -> None:
    """Start and command of every engine, beside what was done by hand."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    hand = found["by_hand"]
    sides = {"start": [name for name in hand if not name.startswith("runc exec")],
             "command": [name for name in hand if name.startswith(("runc exec", "subprocess"))]}  # fmt: skip
    for axis, what in zip(axes, ("start", "command"), strict=True):
        bars = [(name, row[what]["p50_ms"], "#3465a4") for name, row in found["engines"].items()]
        bars += [(name, hand[name]["p50_ms"], "#b0b0b0") for name in sides[what]]
        drawn = axis.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color=[c for _, _, c in bars])
        axis.bar_label(drawn, fmt="%.3g", padding=3)
        axis.set(title={"start": "create to first reply", "command": "a command in a live sandbox"}[what],
                 xscale="log", xlabel="milliseconds, median")  # fmt: skip
        axis.invert_yaxis()
        axis.margins(x=0.2)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="What sandboxes cost on this host.")
    parser.add_argument("--engine", nargs="*", default=[], help="only these")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sandbox.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="abyssal-bench-") as name:
        found = asyncio.run(measure(options.engine, options.repeat, Path(name)))
    result = {"machine": asdict(this_machine()), "python": platform.python_version(), **found, "bars": judged(found)}
    for row in result["bars"]:
        print(f"{row['engine']:14s} {row['what']:8s} {row['percentile']} {row['measured_ms']:9.2f} ms, bar "
              f"{row['bar_ms']:g} ms: {row['ratio']}x")  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
