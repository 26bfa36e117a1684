"""The guest agent by itself, in name spaces alone: wrong frames, ends of the stream, attacks on supervisors."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from abyssal.sandbox import agent_process, wire
from abyssal.sandbox.agent import Agent, Hello
from abyssal.sandbox.agent_files import AgentFiles
from abyssal.sandbox.agent_process import start
from abyssal.sandbox.api import Command, Exit, Stdout, shell
from abyssal.sandbox.conformance.bench import collect
from abyssal.sandbox.engines.joining import new_token
from abyssal.sandbox.errors import AgentLost
from abyssal.sandbox.guest import build
from abyssal.sandbox.wire import Decoder, Frame, Kind

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="name spaces of its own: needs root"),
    pytest.mark.skipif(shutil.which("cc") is None, reason=build.REMEDY),
]


@pytest.fixture(scope="session")
def program(programs: Path) -> Path:
    return build.agent(programs)


@asynccontextmanager
async def guest(program: Path, folder: Path) -> AsyncIterator[tuple[Agent, socket.socket, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    # a tmpfs over /etc: the agent writes the machine's identity there
    begin = f'mount -t tmpfs none /etc && exec "$0" --fd {theirs.fileno()}'
    apart = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    child = subprocess.Popen([*apart, "sh", "-c", begin, str(program)], pass_fds=(theirs.fileno(),))
    theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    agent = Agent(reader, writer)
    try:
        await agent.hello(Hello("guest", user="root", cwd=str(folder)), 10)
        yield agent, ours, child
    finally:
        await agent.bye()
        await agent.close()
        child.wait(10)


def inside(program: Path, folder: Path, work: Callable[[Agent], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with guest(program, folder) as (agent, _, _):
            await work(agent)

    asyncio.run(whole())


async def output(agent: Agent, text: str, **settings: float) -> str:
    return (await collect(await start(agent, Command(shell(text), **settings)))).stdout  # type: ignore[arg-type]


def test_it_is_built_once_for_each_state_of_its_sources(program: Path) -> None:
    before = program.stat().st_mtime_ns
    assert build.agent(program.parent) == program and program.stat().st_mtime_ns == before
    assert b"interpreter" not in subprocess.run(["file", program], capture_output=True, check=False).stdout


def test_killing_or_stopping_the_supervisor_helps_nobody(program: Path, tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        for sign in ("KILL", "STOP"):
            text = f"setsid sleep 5001 & setsid sh -c 'sleep 5002 & sleep 5003' & kill -{sign} $PPID; sleep 5004"
            outcome = await collect(await start(agent, Command(shell(text), timeout=1.0)))
            assert outcome.exit.signal == 9
            left = await output(agent, "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 500[0-9]'")
            assert left == "", sign

    inside(program, tmp_path, work)


def test_unknown_frames_are_answered_and_noise_ends_it(program: Path, tmp_path: Path) -> None:
    async def whole() -> None:
        async with guest(program, tmp_path) as (agent, _, child):
            async with agent.operation() as (op, frames):
                agent._writer.write(wire.HEAD.pack(5, 15, op))
                assert (await agent.next(frames)).values()["errno"] == "38"
            assert await output(agent, "echo still here") == "still here\n"
            agent._writer.write(b"\xff" * 64)
            with pytest.raises(AgentLost):
                async with asyncio.timeout(10):
                    await output(agent, "true")
            assert child.wait(10) is not None

    asyncio.run(whole())


def test_frames_with_random_payloads_do_not_end_it(program: Path, tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        draw = random.Random(7)
        kinds = [Kind.EXEC, Kind.SIGNAL, Kind.RESIZE, Kind.CREDIT, Kind.READ, Kind.STAT, Kind.LIST, Kind.STDIN]
        kinds += [Kind.CHUNK, Kind.CLOSE, Kind.ABORT, Kind.EOF]
        for _ in range(500):
            data = draw.randbytes(draw.randrange(200)).replace(b"path=", b"")
            await agent.send(draw.choice(kinds), draw.randrange(1 << 20, 1 << 21), data)
        assert await output(agent, "echo still here") == "still here\n"

    inside(program, tmp_path, work)


def test_descriptors_do_not_run_out(program: Path, tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        count = "ls /proc/1/fd | wc -l"
        before = await output(agent, count)
        for number in range(30):
            await output(agent, "sleep 0 & exit 1")
            await AgentFiles(agent).write(f"f{number}", b"x")
        assert await output(agent, count) == before
        assert not list(tmp_path.glob(".abyssal*"))

    inside(program, tmp_path, work)


def test_a_very_deep_folder_is_removed(program: Path, tmp_path: Path) -> None:
    async def work(agent: Agent) -> None:
        source = "import os\nfor i in range(1500):\n os.mkdir('d'*20); os.chdir('d'*20)"
        await AgentFiles(agent).make_folder("deep")
        await collect(await start(agent, Command(("python3", "-c", source), cwd=str(tmp_path / "deep"))))
        await AgentFiles(agent).remove("deep")
        assert list(tmp_path.iterdir()) == []

    inside(program, tmp_path, work)


def test_another_host_goes_on_wherever_the_first_one_died(program: Path, tmp_path: Path) -> None:
    """In the middle of a frame, with output unread: nothing incomplete is done, and no output is lost or doubled."""

    async def whole() -> None:
        hello = Hello("guest", user="root", cwd=str(tmp_path), token=new_token())
        async with guest(program, tmp_path) as (first, _, _):
            await first.hello(hello, 10)
            lines = "i=0; while [ $i -lt 60000 ]; do echo $i; i=$((i+1)); done; exit 5"
            process = await start(first, Command(shell(lines), name="lines"))
            await start(first, Command(shell("sleep 0.1; echo x >> other")))
            await AgentFiles(first).write("whole", b"w")
            op, _ = first.begin()
            await first.send(Kind.WRITE, op, wire.fields([("path", "half")]))
            events = process.events()
            read = [await anext(events) for _ in range(3)]
            seen = b"".join(event.data for event in read if isinstance(event, Stdout))
            frame = wire.encode(Kind.EXEC, 99, wire.fields([("arg", "touch"), ("arg", "never")]))
            agent = first
            for number, cut in enumerate((0, 1, 3, 4, 8, 9, 20, len(frame) - 1)):
                stream = socket.socket(fileno=os.dup(agent.descriptor))
                stream.send(frame[:cut])
                await agent.close()
                agent = await Agent.rejoin(stream, hello, (number + 1) << 20)
                assert await agent.first()
                left = await agent_process.left(agent)
                assert [*left] == ["lines"]
            joined = await left["lines"].join(len(seen), 0)
            async for event in joined.events():
                if isinstance(event, Stdout):
                    assert event.offset == len(seen)
                    seen += event.data
                elif isinstance(event, Exit):
                    assert event.code == 5
            assert seen == b"".join(b"%d\n" % number for number in range(60000))
            assert [*await agent_process.left(agent)] == ["lines"]  # until it is settled
            await joined.settle()
            assert not await agent_process.left(agent)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "whole"]
            await agent.bye()
            await agent.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_the_decoder_takes_frames_in_any_pieces() -> None:
    frames = [Frame(Kind.OUT, 7, b"abc"), Frame(Kind.EXITED, 7, wire.fields([("code", 0)])), Frame(Kind.OK, 9)]
    whole = b"".join(wire.encode(Kind(frame.kind), frame.op, frame.data) for frame in frames)
    for size in (1, 3, 10, 1000):
        decoder = Decoder()
        parts = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert [frame for part in parts for frame in decoder.feed(part)] == frames
    with pytest.raises(ValueError, match="bytes"):
        list(Decoder().feed(b"\xff" * 9))
