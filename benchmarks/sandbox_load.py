"""Many sandboxes: calls, containers held at once, copies of a machine held, and cycles; what they cost and leave.

    python benchmarks/sandbox_load.py [--calls 10000] [--held 300] [--forks 20] [--cycles 1000]
        [--out benchmarks/results/sandbox_load.json]

All through the SDK over an edge in this process:

- calls: Python functions in the pool, eight at a time.
- held: containers that live at once, each with a limit of 64 MiB; when all are there, each answers a command.
- forks: copies of one microVM that live at once; each answers.
- cycles: create, a command, stop, one after another.

Between the phases, and every tenth of the cycles, memory and file descriptors of this process are noted, with mounts,
loop devices, control groups and processes of this host that are the platform's: a line through the last nine tenths of
the cycles must be flat, and in the end all counts must be what they were in the beginning. The script ends with 1
where they are not. What this does not show: hosts with more cores, or sandboxes that work hard.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.base.files import write_json
from abyssal.base.machine import resident_bytes, this_machine
from abyssal.sandbox.admission import Capacity
from abyssal.sandbox.api import Limits
from abyssal.sandbox.edge import Edge
from abyssal.sandbox.engines.registry import installed
from abyssal.sandbox.errors import SandboxError
from abyssal.sandbox.hub import Sandboxes

HERE = Path(__file__).parent
MIB = 1 << 20
SMALL = Limits(memory=64 * MIB, pids=32, disk=64 * MIB)
AT_ONCE = 8
GROWTH = 4096.0  # bytes that a cycle may seem to leave in this process; its allocator is not exact
Row = dict[str, Any]


def counts() -> Row:
    """What the platform has on this host now, and this process itself."""
    own = str(os.getpid())
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    children = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children += stat.read_text().rpartition(")")[2].split()[1] == own
        except OSError:  # ended meanwhile
            continue
    return {
        "resident": resident_bytes(),
        "files": len(os.listdir("/proc/self/fd")),
        "children": children,
        "mounts": sum("/run/abyssal/" in line for line in mounts),
        "loops": len(list(Path("/sys/block").glob("loop*/loop/backing_file"))),
        "groups": sum(path.is_dir() for path in Path("/sys/fs/cgroup").glob("**/abyssal/*")),
    }


async def in_turns(work: Sequence[Callable[[], Awaitable[object]]], at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(item: Callable[[], Awaitable[object]]) -> None:
        async with gate:
            await item()

    await asyncio.gather(*(one(item) for item in work))


async def calls(hub: Sandboxes, count: int) -> Row:
    box = await hub.create("function", limits=SMALL, ttl=86_400)
    right = 0

    async def call(number: int) -> None:
        nonlocal right
        result = await box.run(["python3", "-c", f"print({number} * {number})"])
        right += result.text.strip() == str(number * number)

    begin = time.perf_counter()
    await in_turns([lambda number=number: call(number) for number in range(count)], AT_ONCE)  # type: ignore[misc]
    seconds = time.perf_counter() - begin
    await box.stop()
    return {"calls": count, "right": right, "per_s": round(count / seconds, 1), "s": round(seconds, 1)}


async def held(hub: Sandboxes, count: int) -> Row:
    before, begin = free_memory(), time.perf_counter()
    boxes: list[Any] = []

    async def create() -> None:
        boxes.append(await hub.create("container", limits=SMALL, ttl=86_400))

    await in_turns([create] * count, AT_ONCE)
    started = time.perf_counter() - begin
    memory = before - free_memory()
    answers = await asyncio.gather(*(box.run(["echo", box.id]) for box in boxes))
    right = sum(answer.text.strip() == box.id for answer, box in zip(answers, boxes, strict=True))
    begin = time.perf_counter()
    await in_turns([box.stop for box in boxes], AT_ONCE)
    stopped = time.perf_counter() - begin
    return {"held": count, "right": right, "start_s": round(started, 1), "stop_s": round(stopped, 1),
            "memory_mib_each": round(memory / count / MIB, 1)}  # fmt: skip


async def forks(hub: Sandboxes, count: int) -> Row:
    parent = await hub.create("microvm", ttl=86_400)
    before, begin = free_memory(), time.perf_counter()
    twins = await parent.fork(count)
    seconds = time.perf_counter() - begin
    memory = before - free_memory()
    answers = [await twin.run(["echo", twin.id]) for twin in twins]
    right = sum(answer.text.strip() == twin.id for answer, twin in zip(answers, twins, strict=True))
    for box in (*twins, parent):
        await box.stop()
    return {"held": count, "right": right, "fork_s": round(seconds, 1),
            "memory_mib_each": round(memory / count / MIB, 1)}  # fmt: skip


async def cycles(hub: Sandboxes, count: int) -> Row:
    notes, begin = [counts()], time.perf_counter()
    for number in range(1, count + 1):
        box = await hub.create("container", limits=SMALL)
        assert (await box.run(["true"])).exit_code == 0
        await box.stop()
        if number % max(count // 10, 1) == 0:
            notes.append(counts())
            print(f"  {number} cycles: {json.dumps(notes[-1])}", flush=True)
    seconds = time.perf_counter() - begin
    steps = np.arange(1, len(notes)) * max(count // 10, 1)
    slope = float(np.polyfit(steps, [note["resident"] for note in notes[1:]], 1)[0]) if len(steps) > 1 else 0.0
    return {"cycles": count, "per_s": round(count / seconds, 2), "bytes_a_cycle": round(slope), "notes": notes}


def free_memory() -> int:
    """Bytes that this host could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this host's /proc/meminfo has no MemAvailable")


async def measure(options: argparse.Namespace, folder: Path) -> Row:
    engines = installed(folder / "engines")
    capacity = Capacity(memory=64 << 30, sandboxes=options.held + options.forks + 16, starting=AT_ONCE, patience=3600)
    found: Row = {"before": counts()}
    edge = await Edge.open(folder / "home", engines, capacity=capacity)
    try:
        async with Sandboxes(edge) as hub:
            for name, phase in (("calls", calls), ("held", held), ("forks", forks), ("cycles", cycles)):
                count = getattr(options, name)
                if not count:
                    continue
                try:
                    found[name] = await phase(hub, count)
                except SandboxError as error:
                    found[name] = {"error": str(error)}
                print(f"{name}: {json.dumps({k: v for k, v in found[name].items() if k != 'notes'})}", flush=True)
    finally:
        await edge.close()
    found["after"] = counts()
    return found


def complaints(found: Row) -> list[str]:
    """What is not as it should be."""
    told = [f"{name}: {row['error']}" for name, row in found.items() if "error" in row]
    told += [f"{name}: {row['right']} of {row.get('calls', row.get('held'))} right" for name, row in found.items()
             if "right" in row and row["right"] != row.get("calls", row.get("held"))]  # fmt: skip
    for what in ("mounts", "loops", "groups", "children"):
        if found["after"][what] > found["before"][what]:
            told.append(f"{what}: {found['before'][what]} before, {found['after'][what]} after")
    if "notes" in found.get("cycles", {}):
        first, last = found["cycles"]["notes"][1], found["cycles"]["notes"][-1]
        told += [f"{what} grew from {first[what]} to {last[what]}" for what in ("files", "mounts", "loops", "groups")
                 if last[what] > first[what]]  # fmt: skip
        if found["cycles"]["bytes_a_cycle"] > GROWTH:
            told.append(f"memory grows by {found['cycles']['bytes_a_cycle']} bytes a cycle")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description="Many sandboxes at once and one after another.")
    for name, count in (("calls", 10_000), ("held", 300), ("forks", 20), ("cycles", 1000)):
        parser.add_argument(f"--{name}", type=int, default=count, help="0 leaves it out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sandbox_load.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="abyssal-load-") as name:
        found = asyncio.run(measure(options, Path(name)))
    told = complaints(found)
    result = {"machine": asdict(this_machine()), "python": platform.python_version(), **found, "complaints": told}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    print("\n".join(told) or "all answers right, nothing left behind")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
