"""The figure and the table tell what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abyssal.base.errors import InputError
from abyssal.train.skills.grid import plot_grid
from abyssal.train.skills.rates import rates
from abyssal.train.skills.report import lines_of


def results() -> dict[str, Any]:
    rows = [
        {"mode": "non-think", "kind": kind, "length": length, "depth": depth, "passed": number < right}
        for kind in ("single", "key_value")
        for length, right in ((4096, 3), (1 << 20, 1))
        for depth in (0.0, 0.5, 1.0)
        for number in range(3)
    ]
    fields = ("mode", "kind", "length", "depth")
    return {name: rates(rows, *fields[:count]) for name, count in (("by_kind", 2), ("by_length", 3), ("grid", 4))}


def test_every_cell_is_told(tmp_path: Path) -> None:
    path = tmp_path / "grid.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_grid(results(), path)
    text = path.read_text()
    assert (text.count(">3/3<"), text.count(">1/3<")) == (6, 6)
    assert all(f">{word}<" in text for word in ("single", "key value", "4K", "1M", "33%", "50%"))
    plot_grid(results(), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_mode_that_was_not_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no retrieval results in mode 'think-max': there are non-think"):
        plot_grid(results(), tmp_path / "grid.png", "think-max")
    assert not list(tmp_path.iterdir())


def test_lines() -> None:
    suites = {"retrieval": {**results(), "outcomes": {"a": 1}}, "bits": {"prose": {"bits_per_byte": 1.5}}}
    lines = list(lines_of(suites))
    assert "retrieval / by_length / non-think / single / 4096: 100.0% [70.1%, 100.0%] of 9" in lines
    assert "bits / prose / bits_per_byte: 1.5" in lines
    assert len(lines) == 2 + 4 + 1, "neither the grid nor outcomes"
