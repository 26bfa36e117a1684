"""Evaluation items that occur in training text, found by runs of thirteen words they share (training.md 6)."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abyssal.base.errors import DataError

WORD = re.compile(r"[^\W_]+")
RUN = 13


@dataclass
class SetCounts:
    """What was found of one evaluation set.

    Attributes:
        items: its items.
        too_short: those of fewer than thirteen words, which cannot be checked.
        items_hit: those that share a run with the text that was checked.
        runs_hit: different runs that were shared.
        documents_hit: checked documents that share a run.
    """

    items: int = 0
    too_short: int = 0
    items_hit: int = 0
    runs_hit: int = 0
    documents_hit: int = 0


class Contamination:
    """Checks documents against evaluation sets and counts what it finds.

    Args:
        sets: texts of the items of each set, prompt and answer.
        run: length of the runs in words; words are compared in lower case, without punctuation.
    """

    def __init__(self, sets: Mapping[str, Iterable[str]], run: int = RUN):
        self.run = run
        self._counts = {name: SetCounts() for name in sets}
        self._items: dict[str, set[tuple[str, int]]] = {}  # run of words -> items that have it
        for name, items in sets.items():
            counts = self._counts[name]
            for number, item in enumerate(items):
                counts.items += 1
                found = list(runs(item, run))
                counts.too_short += not found
                for words in found:
                    self._items.setdefault(words, set()).add((name, number))
        self._hit_runs: set[str] = set()

    def check(self, document: str) -> set[str]:
        """The names of the sets that share a run with this document; counts them."""
        shared = {words for words in runs(document, self.run) if words in self._items} if self._items else set()
        self._hit_runs |= shared
        names = {name for words in shared for name, _ in self._items[words]}
        for name in names:
            self._counts[name].documents_hit += 1
        return names

    def counts(self) -> dict[str, dict[str, int]]:
        """What was found so far, by set; for a manifest."""
        for name, counts in self._counts.items():
            of_set = {(words, item) for words in self._hit_runs for item in self._items[words] if item[0] == name}
            counts.runs_hit = len({words for words, _ in of_set})
            counts.items_hit = len({item for _, item in of_set})
        return {name: asdict(counts) for name, counts in self._counts.items()}


def items_of(path: Path) -> list[str]:
    """The items of an evaluation set: all that a line of a JSON Lines file says, gzipped or not.

    Raises:
        DataError: the file cannot be read, or a line is no JSON.
    """
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is no evaluation set: {error}; give JSON Lines, which may be gzipped") from None
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(" ".join(_texts(json.loads(line))))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    return items


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def runs(text: str, length: int) -> Iterable[str]:
    """Every run of so many words, joined by spaces."""
    words = WORD.findall(text.lower())
    return (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))
