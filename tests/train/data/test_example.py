"""Examples on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abyssal.base.errors import DataError
from abyssal.train.data.example import Example, assistant, read_examples, user, write_examples

ONE = Example([user("Grüße"), assistant("Hello.", "short")], "conversation", "think-high", source="greeting", id="c/1")


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert write_examples(path, [ONE, ONE]) == 2
    assert list(read_examples(path)) == [ONE, ONE]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "change", [{"thinking_mode": "loud"}, {"extra": 1}, {"id": None, "ID": "x"}], ids=["mode", "unknown", "renamed"]
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    data = {k: v for k, v in (ONE.to_json() | change).items() if v is not None}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ONE.to_json()) + "\n" + json.dumps(data) + "\n")
    with pytest.raises(DataError, match="line 2"):
        list(read_examples(path))


def test_what_is_no_json_and_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{")
    with pytest.raises(DataError, match="line 1"):
        list(read_examples(path))
    with pytest.raises(DataError, match="cannot read"):
        list(read_examples(tmp_path / "b.jsonl"))
