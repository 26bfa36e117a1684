"""Machine facts against the operating system's other ways to tell them."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from abyssal.base import machine
from abyssal.base.machine import multiplies_bfloat16, this_machine


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


def test_products_of_bfloat16_are_those_that_torch_sees() -> None:
    """torch reads the processor's own registers, we what the system says of them."""
    names = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
    seen = torch.cpu.get_capabilities()
    assert multiplies_bfloat16() == any(seen.get(name, False) for name in names), seen


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t: bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd svebf16x\n", False),
    ],
)
def test_products_of_bfloat16_by_what_linux_says(
    text: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / Path(path).name)
    assert multiplies_bfloat16() == found


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is missing, the numbers come from the C library."""
    monkeypatch.setattr(machine, "Path", lambda path: Path(f"/nowhere{path}"))
    found = this_machine()
    assert found.memory_available == found.memory_total > 2**20
    assert found.memory_total == pytest.approx(psutil.virtual_memory().total, rel=0.1)
    assert found.cpu != ""
    assert not multiplies_bfloat16()


def test_disk_of_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        this_machine(tmp_path / "missing")


def test_facts_are_frozen() -> None:
    found = this_machine()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.cores = 0  # type: ignore[misc]
