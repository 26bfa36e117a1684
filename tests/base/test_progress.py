"""Progress speaks about long work only, and on stderr."""

from __future__ import annotations

import pytest

import abyssal.base.progress as module
from abyssal.base.machine import this_machine
from abyssal.base.progress import Progress


def test_short_work_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "tokens", "reading") as progress:
        progress.advance(10)
    assert capfd.readouterr() == ("", "")


def test_long_work_prints_lines(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(1000, "tokens", "reading") as progress:
        for _ in range(10):
            now[0] += 2
            progress.advance(50)
    out, err = capfd.readouterr()
    assert not out
    # a line every ten seconds: at 10 s and at 20 s
    assert err.splitlines() == [
        "reading: 250/1,000 tokens (25%), 25.0 tokens/s, 30 s left",
        "reading: 500/1,000 tokens (50%), 25.0 tokens/s, 20 s left",
    ]
    with Progress(1000, "B", "writing", silent=True) as progress:
        now[0] += 50
        progress.advance(10)
    assert capfd.readouterr() == ("", "")


def test_bytes_are_shown_in_megabytes() -> None:
    progress = Progress(4_000_000, "B", "writing")
    progress.done = 1_000_000
    assert progress.text().startswith("writing: 1/4 MB (25%)")


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1 and machine.cpu and machine.architecture
    assert 0 < machine.memory_available <= machine.memory_total
    assert machine.disk_free > 0
