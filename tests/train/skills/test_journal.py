"""Rows survive a killed process, and are not mixed with those of other weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from abyssal.base.errors import DataError, SaveError
from abyssal.train.skills.journal import Journal

ABOUT = {"identity": "a", "seed": 0}


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Journal(path, ABOUT)
    first.add({"id": "x", "passed": True, "said": "ö\n"})
    first.add({"id": "y", "passed": False})
    again = Journal(path, ABOUT)
    assert again.get("x") == {"id": "x", "passed": True, "said": "ö\n"} and again.get("z") is None


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path, ABOUT).add({"id": "x", "passed": True})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "y", "pas')
    journal = Journal(path, ABOUT)
    assert journal.get("x") is not None and journal.get("y") is None
    journal.add({"id": "y", "passed": False})
    assert Journal(path, ABOUT).get("y") == {"id": "y", "passed": False}
    assert path.read_bytes().startswith(whole)


def test_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path, ABOUT)
    with pytest.raises(DataError, match=r"holds results of .*'seed': 0.*, not of .*'seed': 1"):
        Journal(path, {**ABOUT, "seed": 1})


@pytest.mark.parametrize("text", ["no json\n", '{"a": 1}\n{"passed": true}\n', ""])
def test_no_journal(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="no journal"):
        Journal(path, ABOUT)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="cannot write"):
        Journal(tmp_path / "no" / "rows.jsonl", ABOUT)
