"""Every engine that runs on this machine, against everything that engines have to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from abyssal.sandbox.api import Engine, Probe
from abyssal.sandbox.conformance.bench import Check
from abyssal.sandbox.conformance.suite import CHECKS, missing, put
from abyssal.sandbox.engines.bwrap import BwrapEngine
from abyssal.sandbox.engines.gvisor import GvisorEngine
from abyssal.sandbox.engines.runc import RuncEngine

ENGINES: dict[str, Callable[[Path], Engine]] = {"runc": RuncEngine, "bwrap": BwrapEngine, "gvisor": GvisorEngine}


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
    asyncio.run(put(check, engine, state))
