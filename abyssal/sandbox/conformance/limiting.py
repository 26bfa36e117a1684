"""Limits: who passes one is stopped, is told which, and the box goes on."""

from __future__ import annotations

import asyncio

from abyssal.sandbox.api import MIB, Box, Command, Limits
from abyssal.sandbox.conformance.bench import SMALL, Bench, Checks, answers, expect, python, run
from abyssal.sandbox.errors import AgentLost, LimitHit

check = Checks()
FORKS = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError as error:
    print(made, error.errno)
"""


def _with_its_kernel(box: Box, error: AgentLost) -> bool:
    """Whether a box ended as one may whose memory is its kernel's own: with the kernel, and told as such."""
    return error.cause == "oom" and box.placed.boundary != "shared-kernel"


@check()
async def memory_on_the_heap(bench: Bench) -> None:
    async with bench.box() as box:
        expect((await run(box, python("x = b'a' * (40 << 20)"))).code == 0, "less than the limit is there")
        try:
            outcome = await run(box, python("x = b'a' * (400 << 20); print('held')"))
        except AgentLost as error:
            expect(_with_its_kernel(box, error), "the cause", error.cause)
            return
        told = outcome.exit.limit == "memory" or "MemoryError" in outcome.stderr
        expect("held" not in outcome.stdout and told, "it is told that memory ran out", outcome)
        await answers(box)


@check()
async def memory_in_files_of_memory(bench: Bench) -> None:
    async with bench.box() as box:
        for folder in ("/tmp", "/dev/shm"):
            text = f"head -c 400000000 /dev/zero > {folder}/big; wc -c < {folder}/big; rm -f {folder}/big"
            outcome = await run(box, text)
            sizes = [int(word) for word in outcome.stdout.split()]
            expect(not sizes or sizes[0] <= SMALL.memory, f"{folder} is bounded", outcome)
        await answers(box)


@check()
async def processes(bench: Bench) -> None:
    async with bench.box() as box:
        try:
            outcome = await run(box, python(FORKS))
        except AgentLost as error:
            expect(_with_its_kernel(box, error), "the cause", error.cause)
            return
        made, number = map(int, outcome.stdout.split())
        expect(made < SMALL.pids and number == 11, "fork is refused at the limit", outcome)
        await answers(box)


@check()
async def a_fork_bomb(bench: Bench) -> None:
    async with bench.box() as box:
        bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
        process = await box.start(Command(python(bomb), timeout=3))
        await asyncio.sleep(1.0)
        try:
            try:
                await box.start(Command(("true",)))
            except LimitHit as error:
                expect(error.which == "pids", "the limit is named", error)
            async with asyncio.timeout(30):
                ends = [event async for event in process.events()]
        except AgentLost as error:
            expect(_with_its_kernel(box, error), "the cause", error.cause)
            return
        expect(getattr(ends[-1], "timed_out", False), "the timeout ends it", ends[-1])
        await answers(box)


@check("files")
async def disk(bench: Bench) -> None:
    async with bench.box() as box:
        if "disk-soft" in box.placed.degraded:
            try:
                outcome = await run(box, "head -c 300000000 /dev/zero > big; sleep 5")
                expect(outcome.code != 0, "the watchdog ends it", outcome)
            except AgentLost as error:
                expect(error.cause == "killed", "the cause", error.cause)
            return
        outcome = await run(box, "head -c 300000000 /dev/zero > big; wc -c < big")
        expect("No space left" in outcome.stderr, "the disk is full", outcome)
        expect(int(outcome.stdout) <= SMALL.disk, "no more than the limit", outcome.stdout)
        try:
            await box.files.write("more", bytes(1 << 20))
        except LimitHit as error:
            expect(error.which == "disk", "the limit is named", error)
        else:
            expect(False, "the API writes to a full disk")
        await run(box, "rm big")
        await box.files.write("more", bytes(1 << 20))
        await answers(box)


@check("files")
async def inodes(bench: Bench) -> None:
    async with bench.box() as box:
        if "disk-soft" in box.placed.degraded:
            return
        source = (
            "i=0\ntry:\n while i < 400000:\n  open(str(i),'w').close(); i += 1\nexcept OSError as e: print(e.errno)"
        )
        outcome = await run(box, python(source), timeout=60)
        expect(outcome.stdout.strip() in ("28", "") and outcome.exit.limit is None, "no space or time", outcome)
        await answers(box)


@check()
async def cores_seen(bench: Bench) -> None:
    async with bench.box(limits=Limits(cpu=1.0, memory=256 * MIB)) as box:
        outcome = await run(box, python("import os; print(os.cpu_count(), len(os.sched_getaffinity(0)))"))
        expect(outcome.stdout == "1 1\n" and (await run(box, "nproc")).stdout == "1\n", "one core", outcome.stdout)


@check()
async def processor_time(bench: Bench) -> None:
    async with bench.box(limits=Limits(cpu=0.2, memory=256 * MIB)) as box:
        if "cpu-soft" in box.placed.degraded:
            return
        before = (await box.usage()).cpu_ms
        spin = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
        outcome = await run(box, python(spin))
        after = (await box.usage()).cpu_ms
        if before is not None and after is not None:
            share = (after - before) / outcome.exit.duration_ms
            expect(share < 0.45, "a fifth of a core", share)


@check()
async def descriptors(bench: Bench) -> None:
    async with bench.box() as box:
        source = "k=[]\ntry:\n while True: k.append(open('/dev/null'))\nexcept OSError as e: print(len(k), e.errno)"
        outcome = await run(box, python(source))
        expect(outcome.stdout.split()[-1] in ("24", "23"), "descriptors end", outcome)
        await answers(box)


@check()
async def terminate_is_ignored(bench: Bench) -> None:
    async with bench.box() as box:
        outcome = await run(box, "trap '' TERM INT HUP; while :; do sleep 1; done", timeout=1.0)
        expect(outcome.exit.timed_out and outcome.exit.duration_ms < 8000, "killed at the timeout", outcome.exit)
