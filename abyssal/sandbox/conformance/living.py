"""Pause, snapshot, fork, end."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from abyssal.sandbox.api import STRENGTH, Command, Network, Require, shell
from abyssal.sandbox.conformance.bench import Bench, Checks, answers, collect, expect, run
from abyssal.sandbox.errors import AgentLost, SandboxError, Unsupported

check = Checks()


@check()
async def says_what_it_is(bench: Bench) -> None:
    probe = await bench.engine.probe()
    async with bench.box() as box:
        expect(probe.ok and box.placed == probe.placed, "a box is what the probe said", box.placed, probe)
        expect(box.placed.engine == bench.engine.name and box.features <= bench.engine.features, "its engine")


@check()
async def what_cannot_be_met_is_refused(bench: Bench) -> None:
    async with bench.box() as box:
        placed = box.placed
    stronger = [name for name, strength in STRENGTH.items() if strength > STRENGTH[placed.boundary]]
    wants = [{"require": Require(boundary=name)} for name in stronger]
    wants += [{"require": Require(hard=True)}] if placed.degraded else []
    for want in wants:
        try:
            async with bench.box(**want):
                expect(False, "weakened in silence", want)
        except Unsupported:
            continue
    if "network" not in bench.engine.features:
        try:
            async with bench.box(network=Network("open")):
                expect(False, "a network that is not there", placed)
        except Unsupported:
            pass


@check()
async def what_it_lacks_is_unsupported(bench: Bench) -> None:
    async with bench.box() as box:
        with tempfile.TemporaryDirectory() as folder:
            if "memory-snapshot" not in box.features:
                try:
                    await box.snapshot(Path(folder), memory=True)
                    expect(False, "memory was kept by an engine that cannot")
                except Unsupported:
                    pass
        if "fork" not in box.features:
            try:
                await box.fork(["other"])
                expect(False, "forked by an engine that cannot")
            except Unsupported:
                pass
        await answers(box)


@check("pause")
async def a_pause_stops_everything(bench: Bench) -> None:
    async with bench.box() as box:
        count = "i=0; while :; do i=$((i+1)); echo $i > new; mv new count; sleep 0.01; done"
        process = await box.start(Command(shell(count), timeout=60))
        await asyncio.sleep(0.5)
        await box.pause()
        await asyncio.sleep(0.5)
        await box.resume()
        first = int(await box.files.read("count") or b"0")
        await asyncio.sleep(0.5)
        later = int(await box.files.read("count") or b"0")
        expect(first < 75 and later > first, "it stood still and went on", first, later)
        await process.signal(9)
        await collect(process)


@check("snapshot")
async def the_same_content_has_the_same_digest(bench: Bench) -> None:
    scripts = (
        "mkdir -p a/b; echo 1 > a/b/x; echo 2 > a/y; chmod 600 a/y; ln -s a/y link; echo secret > ~/.bash_history",
        "mkdir a; echo 2 > a/y; sleep 0.1; ln -s a/y link; chmod 600 a/y; mkdir a/b; echo gone > z; "
        "echo 1 > a/b/x; rm z; echo other secret > ~/.bash_history",
    )
    digests = []
    for script in scripts:
        async with bench.box() as box:
            made = await run(box, script)
            expect(made.code == 0, "made", made)
            with tempfile.TemporaryDirectory() as folder:
                said = await box.snapshot(Path(folder))
                layer = (Path(folder) / "layer.erofs").read_bytes()
                expect(b"secret" not in layer, "the shell's history was kept")
            digests.append(said["layer"])
            await answers(box)
    expect(digests[0] == digests[1], "two digests for one content", digests)


@check("fork")
async def a_fork_goes_on_from_here(bench: Bench) -> None:
    async with bench.box() as box:
        await run(box, "echo before > file; mkdir d; touch d/x; rm d/x; echo kept > d/y")
        kids = await box.fork([f"{box.id}-a", f"{box.id}-b"])
        try:
            for kid in kids:
                seen = (await run(kid, "cat file d/y; echo d/*")).stdout
                expect(seen == "before\nkept\nd/y\n", "what was there is there", seen)
                await run(kid, "echo changed > file")
            expect((await run(box, "cat file")).stdout == "before\n", "the parent is its own")
            draws = {(await run(each, "head -c 16 /dev/urandom | od -An -tx1")).stdout for each in (box, *kids)}
            names = {(await run(each, "cat /etc/machine-id")).stdout for each in kids}
            expect(len(draws) == 3 and len(names) == 2, "random numbers and machine ids differ", draws, names)
        finally:
            for kid in kids:
                await kid.stop()


@check()
async def usage_is_counted(bench: Bench) -> None:
    async with bench.box() as box:
        outcome = await run(box, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
        expect((outcome.exit.usage.cpu_ms or 0) > 20, "processor time of a command", outcome.exit)


@check()
async def whoever_waits_learns_of_the_end(bench: Bench) -> None:
    async with bench.box() as box:
        process = await box.start(Command(("sleep", "60"), timeout=60))
        waiting = asyncio.create_task(collect(process))
        await asyncio.sleep(0.1)
        await box.stop()
        try:
            async with asyncio.timeout(10):
                await waiting
            expect(False, "a command of a stopped box ended well")
        except AgentLost as error:
            expect(error.cause == "killed", "the cause", error.cause)
        await box.stop()
        try:
            await box.start(Command(("true",)))
            expect(False, "a stopped box runs commands")
        except SandboxError:
            pass


@check()
async def nothing_is_left(bench: Bench) -> None:
    def state() -> tuple[int, int, set[str]]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        mounts = sum(any(box_id in line for box_id in bench.made) or f"{bench.folder}/box." in line for line in lines)
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        groups = {name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names} & set(bench.made)
        return mounts, descriptors, groups

    async with bench.box() as box:  # what is made once is made
        await answers(box)
    before = state()
    for _ in range(3):
        async with bench.box() as box:
            await box.start(Command(shell("sleep 50 & sleep 50")))
    after = state()
    expect(after[0] == 0 and after[1] <= before[1] and not after[2], "left over", before, after)


@check()
async def a_start_that_fails_leaves_nothing(bench: Bench) -> None:
    try:
        async with bench.box(image="no-such-image"):
            expect(False, "an image that is not there")
    except SandboxError:
        pass
    left = Path("/proc/self/mountinfo").read_text()
    expect(not any(box_id in left for box_id in bench.made), "mounts are left")
