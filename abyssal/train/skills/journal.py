"""Results as JSON lines, written as they come: a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abyssal.base.errors import DataError, SaveError
from abyssal.train.skills.rates import Row


class Journal:
    """The rows of an evaluation by their ids.

    Args:
        path: the file, which may be there from a run that was killed; None keeps rows in memory alone.
        about: what the rows are of: weights and seed. The first line holds it.
    Raises:
        DataError: the file is of something else, or no journal.
        SaveError: it cannot be written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]):
        self._path = path
        self._rows: dict[str, Row] = {}
        if path is None:
            return
        if not path.exists():
            self._write(about)
            return
        lines = path.read_bytes().split(b"\n")
        if lines[-1]:  # a killed process left half a line
            os.truncate(path, path.stat().st_size - len(lines[-1]))
        try:
            head, *rows = (json.loads(line) for line in lines[:-1])
            self._rows = {row["id"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no journal of an evaluation ({error}): name another file") from None
        if head != dict(about):
            raise DataError(f"{path} holds results of {head}, not of {dict(about)}: name another file")

    @property
    def rows(self) -> list[Row]:
        """All of them, in the order in which they came."""
        return list(self._rows.values())

    def get(self, name: str) -> Row | None:
        """The row of an item, or None if it has not been done."""
        return self._rows.get(name)

    def add(self, row: Row) -> None:
        """One more row, on disk when this returns.

        Raises:
            SaveError: it cannot be written.
        """
        self._rows[row["id"]] = row
        if self._path is not None:
            self._write(row)

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self._path is not None
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
        except OSError as error:
            raise SaveError(f"cannot write {self._path}: {error.strerror}; its rows so far are kept") from error
