"""Every engine that runs on this machine, against everything that engines have to do."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from abyssal.sandbox.api import Engine, Probe
from abyssal.sandbox.conformance.attempts import CONTROLS, attempt
from abyssal.sandbox.conformance.bench import Check
from abyssal.sandbox.conformance.suite import CHECKS, missing, put
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.engines.gvisor import INTERRUPT, ORPHANS, GvisorEngine
from abyssal.sandbox.engines.runc import RuncEngine

ENGINES: dict[str, Callable[[Path], Engine]] = {"runc": RuncEngine, "bwrap": BwrapEngine, "gvisor": GvisorEngine}


# what a release of an engine cannot do, as its probe says too; everything else is held against it
FAULTS = {
    "a_timeout_kills_all_that_was_started": ORPHANS,
    "what_a_command_leaves_behind_ends_with_it": ORPHANS,
    "interrupt_from_a_terminal": INTERRUPT,
}


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@cache
def probed(name: str, state: Path) -> tuple[Engine, Probe]:
    engine = ENGINES[name](state)
    return engine, asyncio.run(engine.probe())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
@pytest.mark.parametrize("name", ENGINES)
def test_conformance(name: str, check: Check, state: Path) -> None:
    engine, probe = probed(name, state)
    if not probe.ok:
        pytest.skip(f"{name}: {probe.detail} ({probe.remedy})")
    if why := missing(check, engine):
        pytest.skip(why)
    if probe.placed is not None and (fault := FAULTS.get(check.name)) in probe.placed.degraded:
        pytest.skip(str(fault))
    asyncio.run(put(check, engine, state))


@pytest.mark.skipif(os.geteuid() != 0 or os.uname().machine != "x86_64", reason="controls run as root on x86-64")
@pytest.mark.parametrize("name", CONTROLS)
def test_control_the_attempt_succeeds_without_a_sandbox(name: str) -> None:
    """In name spaces of their own for mounts and the host's name, and nothing else around them."""
    apart = ("unshare", "--mount", "--uts", "--propagation", "private")
    try:
        done = subprocess.run([*apart, *attempt(name)], capture_output=True, text=True, check=False)
    finally:
        Path("/tmp/node").unlink(missing_ok=True)
    if done.stdout.strip() in ("-38", "-97", "-22", "-2"):
        pytest.skip(f"this kernel has no {name} at all: {done.stdout.strip()}")
    assert done.stdout.strip() == "0", done
