"""Commands: output, input, ends, users, terminals."""

from __future__ import annotations

import asyncio
import time

from abyssal.sandbox.api import Command, Stderr, Stdout, shell
from abyssal.sandbox.conformance.bench import Bench, Checks, answers, collect, expect, python, run
from abyssal.sandbox.errors import NotFound

check = Checks()


@check()
async def runs_and_tells_streams_apart(bench: Bench) -> None:
    async with bench.box() as box:
        outcome = await run(box, "echo out; echo err >&2; exit 3")
        expect(outcome.stdout == "out\n" and outcome.stderr == "err\n" and outcome.code == 3, "output", outcome)


@check()
async def streams_while_it_runs_with_offsets(bench: Bench) -> None:
    async with bench.box() as box:
        process = await box.start(Command(shell("echo one; sleep 0.3; echo two; echo bad >&2"), timeout=30))
        seen, begin, first = {Stdout: 0, Stderr: 0}, time.monotonic(), None
        async for event in process.events():
            if isinstance(event, Stdout | Stderr):
                first = first or time.monotonic() - begin
                expect(event.offset == seen[type(event)], "an offset is the sum of what came before", event)
                seen[type(event)] += len(event.data)
        expect(seen == {Stdout: 8, Stderr: 4}, "all bytes came", seen)
        expect(first is not None and time.monotonic() - begin - first > 0.2, "output came only at the end", first)


@check()
async def passes_ten_megabytes_whole(bench: Bench) -> None:
    async with bench.box() as box:
        outcome = await run(box, "head -c 10000000 /dev/zero | tr '\\0' x")
        expect(len(outcome.stdout) == 10_000_000 and set(outcome.stdout) == {"x"}, "bytes", len(outcome.stdout))


@check()
async def a_slow_reader_slows_the_program(bench: Bench) -> None:
    async with bench.box() as box:
        process = await box.start(Command(shell("yes & echo $! > pid; wait"), timeout=60))
        await asyncio.sleep(1.0)
        seen = await run(box, "cat /proc/$(cat pid)/io | grep wchar")
        written = int(seen.stdout.split()[-1]) if seen.stdout else 0
        expect(written < 4 << 20, "an endless line was taken in without anybody reading", written)
        await process.signal(9)
        outcome = await collect(process)
        expect(outcome.exit.signal == 9, "killed", outcome.exit)
        await answers(box)


@check("stdin")
async def feeds_input_and_its_end(bench: Bench) -> None:
    async with bench.box() as box:
        process = await box.start(Command(("cat",), stdin=True, timeout=30))
        data = bytes(range(256)) * 4000

        async def feed() -> None:
            await process.write(data)
            await process.close_stdin()

        feeding = asyncio.create_task(feed())
        got = b"".join([event.data async for event in process.events() if isinstance(event, Stdout)])
        await feeding
        expect(got == data, "cat gives back what it got", len(got))
        expect((await run(box, ("cat",))).stdout == "", "without input, a program reads nothing")


@check("stdin")
async def input_that_nobody_reads_does_not_hang(bench: Bench) -> None:
    async with bench.box() as box:
        process = await box.start(Command(("true",), stdin=True, timeout=30))
        async with asyncio.timeout(20):
            outcome, _ = await asyncio.gather(collect(process), process.write(bytes(1_000_000)))
        expect(outcome.code == 0, "true ends well", outcome)


@check()
async def says_what_ended_it(bench: Bench) -> None:
    async with bench.box() as box:
        killed = await run(box, "kill -TERM $$")
        expect(killed.exit.signal == 15 and killed.code == 143, "a signal is named", killed.exit)
        process = await box.start(Command(("sleep", "60"), timeout=60))
        await process.signal(2)
        expect((await collect(process)).exit.signal == 2, "signals reach the program")


@check()
async def missing_programs_and_folders_are_named(bench: Bench) -> None:
    async with bench.box() as box:
        for command in (Command(("/no/such",)), Command(("no-such",)), Command(("ls",), cwd="/no/such")):
            try:
                await box.start(command)
            except NotFound:
                continue
            expect(False, "NotFound", command)
        await answers(box)


@check()
async def a_timeout_kills_all_that_was_started(bench: Bench) -> None:
    async with bench.box() as box:
        text = "sleep 4321 & setsid sleep 4322 & (setsid sh -c 'sleep 4323 & sleep 4324' &) ; trap '' TERM HUP; wait"
        begin = time.monotonic()
        outcome = await run(box, text, timeout=1.0)
        expect(outcome.exit.timed_out and outcome.exit.signal == 9, "timed out", outcome.exit)
        expect(time.monotonic() - begin < 10, "soon")
        left = await run(box, "grep -l -a -E '432[0-9]' /proc/[0-9]*/cmdline | grep -v -e self -e /$$/")
        expect("sleep" not in left.stdout and left.stdout.count("/proc/") <= 1, "nothing is left", left.stdout)


@check()
async def what_a_command_leaves_behind_ends_with_it(bench: Bench) -> None:
    async with bench.box() as box:
        await run(box, "setsid sleep 4321 > /dev/null 2>&1 & echo $! > pid; sleep 0.1")
        expect((await run(box, "test -d /proc/$(cat pid)")).code == 1, "an orphan lives on")


@check("background")
async def kept_commands_leave_servers_running(bench: Bench) -> None:
    async with bench.box() as box:
        started = await run(box, "setsid sleep 4321 & echo $! > pid", keep=True)
        expect(started.code == 0, "it ended", started.exit)
        expect((await run(box, "test -d /proc/$(cat pid)")).code == 0, "it lives on")
        expect((await run(box, "kill -9 $(cat pid)")).code == 0, "it can be ended from another command")


@check("background")
async def many_at_once(bench: Bench) -> None:
    async with bench.box() as box:
        outcomes = await asyncio.gather(*(run(box, f"sleep 0.2; echo {number}") for number in range(8)))
        expect([each.stdout for each in outcomes] == [f"{n}\n" for n in range(8)], "each has its own output", outcomes)


@check()
async def environment_and_folder(bench: Bench) -> None:
    async with bench.box(env={"A": "sandbox", "B": "sandbox"}) as box:
        outcome = await run(box, "echo $A $B $TZ $LANG $PYTHONHASHSEED; pwd", env={"B": "command"}, cwd="/tmp")
        expect(outcome.stdout == "sandbox command UTC C.UTF-8 0\n/tmp\n", "environment and folder", outcome.stdout)
        expect((await run(box, "pwd; touch here")).stdout == "/work\n", "commands begin in /work")
        seen = (await run(box, "env")).stdout
        expect("ABYSSAL" not in seen and "TOKEN" not in seen, "the platform's environment is not seen", seen)


@check()
async def the_user_is_no_root(bench: Bench) -> None:
    async with bench.box() as box:
        expect((await run(box, "id -u")).stdout == "1000\n", "user")
        status = (await run(box, "cat /proc/self/status")).stdout
        for line in ("CapPrm:\t0000000000000000", "CapEff:\t0000000000000000"):
            expect(line in status, line, status)
        asked = await run(box, python("import ctypes; print(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))"))
        expect(asked.stdout == "1\n", "no new privileges", asked)


@check("tty")
async def a_terminal(bench: Bench) -> None:
    async with bench.box() as box:
        text = "tty; stty size; read x; stty size; echo got $x"
        process = await box.start(Command(shell(text), tty=(31, 97), timeout=60))
        seen = ""
        async for event in process.events():
            if not isinstance(event, Stdout):
                continue
            seen += event.data.decode()
            if "31 97" in seen and "typed" not in seen:
                seen += "typed"
                await process.resize(40, 120)
                await process.write(b"word\n")
        expect("/dev/pts/" in seen and "typed" in seen, "a terminal of this size", seen)
        expect("40 120" in seen and "got word" in seen, "typed and resized", seen)


@check("tty")
async def interrupt_from_a_terminal(bench: Bench) -> None:
    async with bench.box() as box:
        process = await box.start(Command(("sleep", "60"), tty=(24, 80), timeout=30))
        await asyncio.sleep(0.3)
        await process.write(b"\x03")
        expect((await collect(process)).exit.signal == 2, "control-C interrupts")
