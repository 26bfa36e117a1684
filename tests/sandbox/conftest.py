"""Which tests of sandboxes run on request alone, and what several of them share."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from abyssal.sandbox.errors import Unsupported
from abyssal.sandbox.guest import build

LONG = {"test_vm_conformance"}  # minutes, where processors are emulated


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "sandbox" and item.path.stem in LONG:
            item.add_marker("boxes")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest agent, compiled once; without a compiler, an empty folder, and probes say why nothing runs."""
    folder = tmp_path_factory.mktemp("programs")
    with suppress(Unsupported):
        build.agent(folder)
    return folder


@pytest.fixture
def state(tmp_path: Path, programs: Path) -> Path:
    """A state folder of engines that has nothing but the agent."""
    shutil.copytree(programs, tmp_path / "state" / "programs")
    return tmp_path / "state"


@pytest.fixture
def home(tmp_path: Path, programs: Path) -> Path:
    """A home folder of an edge whose engines have nothing but the agent."""
    shutil.copytree(programs, tmp_path / "edge" / "engines" / "programs")
    return tmp_path / "edge"
