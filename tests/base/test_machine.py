"""Machine facts against the operating system's other ways to tell them."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from pathlib import Path

import psutil
import pytest

from abyssal.base import machine
from abyssal.base.machine import this_machine


def test_facts_agree_with_psutil(tmp_path: Path) -> None:
    found = this_machine(tmp_path)
    memory = psutil.virtual_memory()
    assert found.memory_total == memory.total
    assert 0 < found.memory_available <= found.memory_total
    assert found.memory_available == pytest.approx(memory.available, rel=0.3)
    assert found.disk_free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1, abs=2**30)
    assert found.architecture == platform.machine()
    assert found.cpu.strip() == found.cpu != ""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to cores")
def test_cores_are_those_we_may_use() -> None:
    before = os.sched_getaffinity(0)
    assert this_machine().cores == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert this_machine().cores == 1
    finally:
        os.sched_setaffinity(0, before)


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is missing, the numbers come from the C library."""
    monkeypatch.setattr(machine, "Path", lambda path: Path(f"/nowhere{path}"))
    found = this_machine()
    assert found.memory_available == found.memory_total > 2**20
    assert found.memory_total == pytest.approx(psutil.virtual_memory().total, rel=0.1)
    assert found.cpu != ""


def test_disk_of_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        this_machine(tmp_path / "missing")


def test_facts_are_frozen() -> None:
    found = this_machine()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.cores = 0  # type: ignore[misc]
