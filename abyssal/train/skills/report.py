"""Results as a short table for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines_of(suites: dict[str, Any]) -> Iterator[str]:
    """A line for every rate and number but the grid by depth, which `grid.plot_grid` draws.

    Args:
        suites: `suites` of what `score.score` returns.
    """
    for suite, results in suites.items():
        for name, value in results.items():
            if name not in ("grid", "outcomes"):
                yield from _lines((suite, name), value)


def _lines(path: tuple[str, ...], value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{' / '.join(path)}: {value:.4g}"
    elif "n" in value:
        told = f"{value['rate']:.1%} [{value['low']:.1%}, {value['high']:.1%}]" if value["n"] else "-"
        yield f"{' / '.join(path)}: {told} of {value['n']}"
    elif path[-1] != "outcomes":
        for name, inner in value.items():
            yield from _lines((*path, name), inner)
