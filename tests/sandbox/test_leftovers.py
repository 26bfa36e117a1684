"""What a platform that died leaves on its host, and what a sweep must not touch."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from abyssal.sandbox.api import Engine, Spec
from abyssal.sandbox.conformance.bench import SMALL, answers
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.engines.gvisor import GvisorEngine
from abyssal.sandbox.engines.runc import RuncEngine
from tests.sandbox.traces import traces

DIES = """
import asyncio, os, sys
from pathlib import Path
from abyssal.sandbox.api import Command, Spec, shell
from abyssal.sandbox.engines.{module} import {name}

async def main():
    state, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir()
    box = await {name}(state).create(folder.name, Spec("container"), folder)
    await box.start(Command(shell("sleep 4711 & echo x > file; sleep 4711")))
    os._exit(9)

asyncio.run(main())
"""


ENGINES = [("runc", RuncEngine), ("bwrap", BwrapEngine), ("gvisor", GvisorEngine)]


@pytest.mark.parametrize(("module", "kind"), ENGINES)
def test_a_sweep_takes_the_dead_and_leaves_the_living(module: str, kind: type, state: Path, tmp_path: Path) -> None:
    engine: Engine = kind(state)
    probe = asyncio.run(engine.probe())
    if not probe.ok:
        pytest.skip(f"{probe.detail} ({probe.remedy})")
    dead, alive = f"dead-{uuid.uuid4().hex[:12]}", f"alive-{uuid.uuid4().hex[:12]}"
    program = DIES.format(module=module, name=kind.__name__)
    died = subprocess.run([sys.executable, "-c", program, str(state), str(tmp_path / dead)], check=False)
    assert died.returncode == 9 and traces(dead)

    async def work() -> None:
        (tmp_path / alive).mkdir()
        box = await engine.create(alive, Spec("container", limits=SMALL), tmp_path / alive)
        try:
            other = tmp_path / "other"
            other.mkdir()
            assert dead not in await kind(other).sweep(frozenset()), "another platform's box"
            assert await engine.sweep(frozenset({alive})) == [dead]
            assert traces(dead) == []
            await answers(box)
        finally:
            await box.stop()
        assert await engine.sweep(frozenset()) == [] and traces(alive) == []

    asyncio.run(work())
