"""Thirteen shared words are found, twelve are not."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from abyssal.base.errors import DataError
from abyssal.train.data.contamination import Contamination, items_of

WORDS = [f"w{i}" for i in range(40)]
ITEM = " ".join(WORDS[:20])


def test_thirteen_words_are_a_hit_and_twelve_are_not() -> None:
    check = Contamination({"needles": [ITEM]})
    assert check.check("before " + " ".join(WORDS[3:15]) + " after") == set()
    assert check.check("before " + " ".join(WORDS[3:16]) + " after") == {"needles"}


def test_case_and_punctuation_do_not_hide_it() -> None:
    check = Contamination({"a": [ITEM]})
    assert check.check(",\n".join(word.upper() for word in WORDS[:13]) + "!") == {"a"}
    assert check.check("_".join(WORDS[:13])) == {"a"}


def test_counts_by_set() -> None:
    check = Contamination({"a": [ITEM, "too short", " ".join(WORDS[20:])], "b": [ITEM], "c": []})
    documents = [ITEM, "nothing of it", " ".join(WORDS[:14]), " ".join(WORDS[25:38])]
    assert [check.check(d) for d in documents] == [{"a", "b"}, set(), {"a", "b"}, {"a"}]
    counts = check.counts()
    assert counts["a"] == {"items": 3, "too_short": 1, "items_hit": 2, "runs_hit": 9, "documents_hit": 3}
    assert counts["b"] == {"items": 1, "too_short": 0, "items_hit": 1, "runs_hit": 8, "documents_hit": 2}
    assert counts["c"] == {"items": 0, "too_short": 0, "items_hit": 0, "runs_hit": 0, "documents_hit": 0}
    assert check.counts() == counts


def test_against_a_plain_comparison() -> None:
    """Every pair of windows of a short alphabet, by brute force."""
    text = [str((i * i) % 7) for i in range(60)]
    item = [str((i * i) % 7) for i in range(9, 30)]
    for run in (2, 5, 13, 21, 22):
        windows = {tuple(item[i : i + run]) for i in range(len(item) - run + 1)}
        expected = any(tuple(text[i : i + run]) in windows for i in range(len(text) - run + 1))
        assert (Contamination({"x": [" ".join(item)]}, run).check(" ".join(text)) == {"x"}) is expected


def test_items_are_all_that_a_line_says(tmp_path: Path) -> None:
    lines = b'{"question": "what is it", "n": 3, "choices": ["this", {"label": "th\xe2\x80\xa8at"}]}\n\n"plain"\n'
    (tmp_path / "set.jsonl").write_bytes(lines)
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("set.jsonl", "set.jsonl.gz"):
        assert items_of(tmp_path / name) == ["what is it this th\u2028at", "plain"]
    (tmp_path / "bad.jsonl").write_bytes(b'{"a": "b"}\n{"a"\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: "):
        items_of(tmp_path / "bad.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(lines)[:-5])
    for name in ("cut.gz", "none.jsonl"):
        with pytest.raises(DataError, match="is no evaluation set"):
            items_of(tmp_path / name)
