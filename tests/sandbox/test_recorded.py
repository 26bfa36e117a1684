"""Operations through the log, on real processes: once each, answered again from the log, named when unknown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from abyssal.sandbox.api import Exit, Limits, Spec, Stdout, shell
from abyssal.sandbox.engines.process import ProcessEngine
from abyssal.sandbox.errors import Divergence, LogError, NotFound, OutcomeUnknown, SandboxError, SandboxLost
from abyssal.sandbox.log.hiding import Hiding
from abyssal.sandbox.log.reader import read_log
from abyssal.sandbox.log.writer import Log
from abyssal.sandbox.operation import Asked
from abyssal.sandbox.recorded import Recorded

SPEC = Spec("container")
Test = Callable[..., Coroutine[Any, Any, None]]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@asynccontextmanager
async def opened(
    folder: Path, limits: Limits = SPEC.limits, secrets: dict[str, str] | None = None
) -> AsyncIterator[Recorded]:
    """A box and its log, new or once more."""
    engine, inside = ProcessEngine(allow_unsafe=True), folder / "box"
    if inside.exists():
        box = await engine.adopt("b1", SPEC, inside, {}, paused=False)
    else:
        inside.mkdir(parents=True)
        box = await engine.create("b1", SPEC, inside)
    recorded = Recorded(box, Log(folder / "log", "b1"), limits, Hiding(b"key", secrets or {}))
    try:
        yield recorded
    finally:
        await recorded.close()


def sh(text: str, **more: Any) -> dict[str, Any]:
    return {"op": "exec", "argv": list(shell(text)), **more}


async def done(recorded: Recorded, req: dict[str, Any], asked: Asked, data: bytes | None = None) -> dict[str, Any]:
    operation, replayed = await recorded.ask(req, asked, data)
    res = await operation.result()
    streams = {name: operation.kept(name).data for name in ("stdout", "stderr", "data") if name in res}
    return {**res, "replayed": replayed, **streams}


def test_a_client_that_comes_back_gets_what_it_got(tmp_path: Path) -> None:
    async def work() -> None:
        asks = [
            (sh("echo a >> f; echo out; echo err >&2; exit 3"), None),
            ({"op": "file.write", "path": "g", "mode": 0o600}, b"x" * 9000),
            (sh("cat; wc -c < g"), b"to stdin\n"),
            ({"op": "file.read", "path": "g"}, None),
            ({"op": "file.list", "path": "."}, None),
            ({"op": "file.move", "path": "g", "to": "h"}, None),
            ({"op": "file.stat", "path": "h"}, None),
        ]
        first: list[dict[str, Any]] = []
        async with opened(tmp_path) as recorded:
            for ordinal, (req, data) in enumerate(asks):
                first.append(await done(recorded, req, Asked(stream="main", ordinal=ordinal), data))
            assert not any(res["replayed"] for res in first)
            assert (first[0]["exit_code"], first[0]["stdout"], first[0]["stderr"]) == (3, b"out\n", b"err\n")
            assert first[2]["stdout"] == b"to stdin\n9000\n"
            assert first[3]["data"] == b"x" * 9000
        for _ in range(2):
            async with opened(tmp_path) as recorded:
                for ordinal, (req, data) in enumerate(asks):
                    again = await done(recorded, req, Asked(stream="main", ordinal=ordinal), data)
                    assert again == {**first[ordinal], "replayed": True}
                assert (await done(recorded, sh("cat f"), Asked()))["stdout"] == b"a\n"

    run(work())


def test_errors_come_back_too(tmp_path: Path) -> None:
    async def work() -> None:
        for turn in range(2):
            async with opened(tmp_path) as recorded:
                operation, replayed = await recorded.ask({"op": "file.read", "path": "none"}, Asked(op_id="r"))
                with pytest.raises(NotFound, match="none"):
                    await operation.result()
                assert replayed == bool(turn)
                operation, _ = await recorded.ask({"op": "exec", "argv": ["no-such-program"]}, Asked(op_id="e"))
                with pytest.raises(NotFound, match="no-such-program"):
                    await operation.result()

    run(work())


def test_another_request_in_the_same_place_is_divergence(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            await done(recorded, sh("true"), Asked(op_id="a", stream="main", ordinal=0))
            for asked in (Asked(op_id="a"), Asked(stream="main", ordinal=0)):
                with pytest.raises(Divergence, match="rm -rf") as caught:
                    await recorded.ask(sh("rm -rf x"), asked)
                assert caught.value.seq == 0
                assert caught.value.expected != caught.value.got

    run(work())


def test_racing_clients_get_one_operation(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            asked = Asked(stream="main", ordinal=0)
            results = await asyncio.gather(*(done(recorded, sh("sleep 0.1; echo x >> f"), asked) for _ in range(20)))
            assert len({res["stdout"] for res in results}) == 1
            assert (await done(recorded, {"op": "file.read", "path": "f"}, Asked()))["data"] == b"x\n"
        assert sum(record.kind == "op.intent" for record in read_log(tmp_path / "log").records) == 1

    run(work())


def test_a_caller_that_leaves_changes_nothing_and_finds_it_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            asked = Asked(op_id="long")
            caller = asyncio.create_task(done(recorded, sh("echo begun; sleep 0.4; echo done"), asked))
            await asyncio.sleep(0.15)
            caller.cancel()
            operation, replayed = await recorded.ask(sh("echo begun; sleep 0.4; echo done"), asked)
            assert not replayed
            assert operation.running
            events = [event async for event in operation.events(stdout=3)]
            assert b"".join(event.data for event in events if isinstance(event, Stdout)) == b"un\ndone\n"
            assert isinstance(events[0], Stdout)
            assert events[0].offset == 3
            assert isinstance(events[-1], Exit)
            assert events[-1].code == 0

    run(work())


def test_an_operation_that_the_edge_lost_is_unknown_until_resolved(tmp_path: Path) -> None:
    async def work() -> None:
        asked, req = Asked(stream="main", ordinal=0), sh("echo x >> f; sleep 5; echo y >> f")
        async with opened(tmp_path) as recorded:
            operation, _ = await recorded.ask(req, asked)
            await operation.started.wait()
            await asyncio.sleep(0.2)
        with pytest.raises(OutcomeUnknown):
            await operation.result()
        for _ in range(2):
            async with opened(tmp_path) as recorded:
                with pytest.raises(OutcomeUnknown) as caught:
                    await recorded.ask(req, asked)
                assert (await done(recorded, sh("cat f"), Asked()))["stdout"] == b"x\n"
        async with opened(tmp_path) as recorded:
            await recorded.resolve(caught.value.op_id, {"state": "done", "exit_code": 0})
            with pytest.raises(SandboxError, match="not unknown"):
                await recorded.resolve(caught.value.op_id, {"state": "failed"})
            res = await done(recorded, req, asked)
            assert (res["declared"], res["replayed"], res["exit_code"]) == (True, True, 0)
        async with opened(tmp_path) as recorded:
            assert (await done(recorded, req, asked))["declared"]

    run(work())


def test_intent_is_durable_before_and_result_before_the_caller(tmp_path: Path) -> None:
    """The command itself looks at the log on the disk."""

    async def work() -> None:
        async with opened(tmp_path) as recorded:
            file = tmp_path / "log" / "trajectory.log"
            res = await done(recorded, sh(f"grep -c asked-for-this {file}"), Asked(op_id="asked-for-this"))
            assert res["stdout"] == b"1\n"
            kinds = [record.kind for record in read_log(file).records]
            assert kinds == ["op.intent", "op.result"]

    run(work())


def test_a_log_that_cannot_be_written_stops_operations(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            real = recorded.log._write

            def full(group: bytes) -> None:
                raise OSError(28, "No space left on device")

            recorded.log._write = full  # type: ignore[method-assign]
            operation, _ = await recorded.ask(sh("touch ran"), Asked())
            with pytest.raises(LogError, match="No space left"):
                await operation.result()
            recorded.log._write = real  # type: ignore[method-assign]
            with pytest.raises(LogError, match="No space left"):
                await recorded.ask(sh("touch ran"), Asked())
            assert not (tmp_path / "box" / "work" / "ran").exists()

    run(work())


def test_output_beyond_the_cap_is_counted(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path, Limits(output=10000)) as recorded:
            text = "seq 100000; head -c 5000 /dev/zero >&2"
            res = await done(recorded, sh(text), Asked(op_id="a"))
            whole = b"".join(b"%d\n" % number for number in range(1, 100001))
            entry = recorded.find("a").res
            assert entry is not None
            assert entry["stdout"]["truncated_from"] == len(whole)
            assert res["stdout"] == whole[:5000] + whole[-5000:]
            assert res["stderr"] == bytes(5000)
            offsets = [
                event.offset for event in [e async for e in recorded.find("a").events()] if isinstance(event, Stdout)
            ]
            assert offsets == [0, len(whole) - 5000]

    run(work())


def test_secrets_are_in_neither_log_nor_output(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path, secrets={"KEY": "hunter2hunter2"}) as recorded:
            res = await done(recorded, sh("printf hunter2; sleep 0.1; echo hunter2; echo hunter2hunter2 > f"), Asked())
            assert b"secret KEY" in res["stdout"]
            await done(recorded, {"op": "file.write", "path": "g"}, Asked(), b"hunter2hunter2" * 1000)
        for file in (tmp_path / "log").rglob("*"):
            assert file.is_dir() or b"hunter2hunter2" not in file.read_bytes()
        assert (tmp_path / "box" / "work" / "f").read_bytes() == b"hunter2hunter2\n"

    run(work())


def test_input_signals_and_terminals(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            cat, _ = await recorded.ask({"op": "exec", "argv": ["cat"], "stdin": True}, Asked(op_id="cat"))
            await done(recorded, {"op": "stdin", "of": "cat"}, Asked(), b"one ")
            await done(recorded, {"op": "stdin", "of": "cat", "end": True}, Asked(), b"two")
            await cat.result()
            assert cat.kept("stdout").data == b"one two"
            sleeper, _ = await recorded.ask({"op": "exec", "argv": ["sleep", "60"]}, Asked(op_id="sleep"))
            await done(recorded, {"op": "signal", "of": "sleep", "signal": 15}, Asked())
            res = await sleeper.result()
            assert (res["state"], res["signal"], res["exit_code"]) == ("cancelled", 15, 143)
            with pytest.raises(NotFound, match="not run any more"):
                await done(recorded, {"op": "signal", "of": "sleep", "signal": 15}, Asked())
            terminal, _ = await recorded.ask(sh("stty size; read x; echo got $x", tty=[30, 90]), Asked(op_id="t"))
            await recorded.tty_input(terminal, b"hello\n", "me")
            await terminal.result()
            assert b"30 90" in terminal.kept("stdout").data
            assert b"got hello" in terminal.kept("stdout").data
        kinds = [record.kind for record in read_log(tmp_path / "log").records if record.op_id == "t"]
        assert kinds[0] == "op.intent"
        assert kinds[-1] == "op.result"
        assert {"tty.open", "tty.in", "tty.out", "tty.close"} <= set(kinds)

    run(work())


def test_a_timeout_kills_those_that_left_the_session_too(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            text = "setsid sh -c 'sleep 1.5; touch late' & sleep 60"
            res = await done(recorded, sh(text, timeout=0.3), Asked())
            assert res["timed_out"]
            await asyncio.sleep(1.7)
            assert not (tmp_path / "box" / "work" / "late").exists()

    run(work())


def test_a_lost_sandbox_answers_from_its_log(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            await done(recorded, sh("echo kept"), Asked(stream="main", ordinal=0))
        recorded = Recorded(None, Log(tmp_path / "log", "b1"), SPEC.limits, Hiding(b"key", {}))
        assert (await done(recorded, sh("echo kept"), Asked(stream="main", ordinal=0)))["stdout"] == b"kept\n"
        with pytest.raises(SandboxLost):
            await recorded.ask(sh("true"), Asked(stream="main", ordinal=1))
        await recorded.close()

    run(work())


def test_a_thousand_operations_are_answered_within_a_second(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as recorded:
            await asyncio.gather(
                *(done(recorded, {"op": "file.list", "path": "."}, Asked(stream="m", ordinal=n)) for n in range(1000))
            )
        async with opened(tmp_path) as recorded:
            begin = asyncio.get_running_loop().time()
            for number in range(1000):
                asked = Asked(stream="m", ordinal=number)
                assert (await done(recorded, {"op": "file.list", "path": "."}, asked))["replayed"]
            assert asyncio.get_running_loop().time() - begin < 1

    run(work())
