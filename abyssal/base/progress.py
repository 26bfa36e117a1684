"""Progress of long work, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

LINE_EVERY_S = 10.0
SHOW_AFTER_S = 1.0  # short work shows nothing


class StatusLine:
    """A line on stderr that is drawn anew in its place on a terminal; elsewhere each one stays.

    Attributes:
        terminal: whether stderr is one.
    """

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._drawn = False

    def show(self, text: str) -> None:
        """Draw it."""
        if self.terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._drawn = True
        else:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take away what stands there."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Leave it, and go on below."""
        if self._drawn:
            print(file=sys.stderr, flush=True)
            self._drawn = False


class Progress:
    """Counts units of work; prints rate and time left.

    Args:
        total: units in all.
        unit: what is counted; "B" is printed in MB.
        label: what is going on.
        silent: print nothing.
    """

    def __init__(self, total: int, unit: str, label: str, *, silent: bool = False):
        self.total, self.unit, self.label, self.silent = total, unit, label, silent
        self.done = 0
        self._begin = self._shown = time.monotonic()
        self._line = StatusLine()

    def __enter__(self) -> Self:
        self._begin = self._shown = time.monotonic()
        return self

    def advance(self, count: int = 1) -> None:
        """Add finished units; print when it is time."""
        self.done += count
        now = time.monotonic()
        pause = 0.2 if self._line.terminal else LINE_EVERY_S
        if not self.silent and now - self._begin > SHOW_AFTER_S and now - self._shown >= pause:
            self._shown = now
            self._line.show(self.text())

    def text(self) -> str:
        """The line that is shown."""
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        rate = self.done / elapsed
        left = (self.total - self.done) / rate if rate else 0.0
        scale, unit = (1e6, "MB") if self.unit == "B" else (1.0, self.unit)
        share = 100 * self.done / self.total if self.total else 100.0
        return (
            f"{self.label}: {self.done / scale:,.0f}/{self.total / scale:,.0f} {unit} ({share:.0f}%),"
            f" {rate / scale:,.1f} {unit}/s, {left:,.0f} s left"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.clear()
