"""Pass rates with their 95% Wilson intervals, over rows of results sorted by their fields."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054  # a normal variable lies within so many deviations with probability 0.95
Row = dict[str, Any]


def wilson(passed: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The interval of rates p that `passed` of `n` does not contradict: |passed/n - p| <= z sqrt(p (1 - p) / n).

    Args:
        passed: items that passed.
        n: items.
        z: deviations; the default gives 95%.
    Raises:
        ValueError: there are no items, or more passed than there are.
    """
    if not 0 <= passed <= n or n < 1:
        raise ValueError(f"{passed} of {n} items passed: give 0 to n of at least one")
    rate = passed / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # the ends are exact there; the formula rounds
    low = 0.0 if passed == 0 else middle - half
    high = 1.0 if passed == n else middle + half
    return low, high


def rate_of(flags: Iterable[bool]) -> dict[str, Any]:
    """`passed`, `n`, `rate`, and `low` and `high` of the interval; without items only the first two."""
    given = list(flags)
    if not given:
        return {"passed": 0, "n": 0}
    low, high = wilson(sum(given), len(given))
    return {"passed": sum(given), "n": len(given), "rate": sum(given) / len(given), "low": low, "high": high}


def rates(rows: Sequence[Row], *fields: str, what: str = "passed") -> dict[str, Any]:
    """The rate of a flag of the rows, sorted by the values of fields: a dict in a dict for each."""
    return _sorted(rows, fields, lambda part: rate_of(bool(row[what]) for row in part))


def counts(rows: Sequence[Row], *fields: str, what: str = "outcome") -> dict[str, Any]:
    """How often each value of a field occurs, sorted likewise."""
    return _sorted(rows, fields, lambda part: dict(Counter(str(row[what]) for row in part).most_common()))


def _sorted(
    rows: Sequence[Row], fields: Sequence[str], leaf: Callable[[Sequence[Row]], Mapping[str, Any]]
) -> dict[str, Any]:
    if not fields:
        return dict(leaf(rows))
    parts: dict[Any, list[Row]] = {}
    for row in rows:
        parts.setdefault(row[fields[0]], []).append(row)
    numbers = all(isinstance(value, int | float) for value in parts)
    order = sorted(parts) if numbers else list(parts)
    return {str(value): _sorted(parts[value], fields[1:], leaf) for value in order}
