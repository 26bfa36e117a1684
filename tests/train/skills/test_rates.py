"""Wilson's interval against known values and against the equation that defines it; rows sorted by fields."""

from __future__ import annotations

import math

import pytest

from abyssal.train.skills.rates import Z95, counts, rate_of, rates, wilson


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(passed: int, n: int, low: float, high: float) -> None:
    assert wilson(passed, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.mark.parametrize(("passed", "n"), [(0, 1), (1, 1), (3, 7), (19, 20), (20, 20), (950, 1000), (1, 100000)])
def test_ends_are_roots_of_the_score_equation(passed: int, n: int) -> None:
    """Bisection on (passed/n - p)^2 = z^2 p (1 - p) / n on either side of the rate."""
    rate = passed / n

    def beyond(p: float) -> bool:
        return (rate - p) ** 2 > Z95**2 * p * (1 - p) / n

    def root(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
        return inside

    # a little inside of 0 and 1, where the equation holds at both ends
    start = min(max(rate, 1e-9), 1 - 1e-9)
    low, high = wilson(passed, n)
    assert low == pytest.approx(root(start, 0.0) if passed else 0.0, abs=1e-8)
    assert high == pytest.approx(root(start, 1.0) if passed < n else 1.0, abs=1e-8)


def test_z_is_the_quantile() -> None:
    assert math.erf(Z95 / math.sqrt(2)) == pytest.approx(0.95, abs=1e-15)


@pytest.mark.parametrize(("passed", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_numbers(passed: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{passed} of {n} items"):
        wilson(passed, n)


ROWS = [
    {"kind": "b", "length": 4096, "passed": True, "outcome": "right"},
    {"kind": "b", "length": 1024, "passed": False, "outcome": "invented"},
    {"kind": "a", "length": 4096, "passed": True, "outcome": "right"},
    {"kind": "b", "length": 4096, "passed": False, "outcome": "elsewhere"},
]


def test_rows_are_sorted_by_fields() -> None:
    found = rates(ROWS, "kind", "length")
    assert list(found) == ["b", "a"] and list(found["b"]) == ["1024", "4096"]
    assert (found["b"]["4096"]["passed"], found["b"]["4096"]["n"], found["b"]["4096"]["rate"]) == (1, 2, 0.5)
    assert found["a"]["4096"]["low"] == pytest.approx(wilson(1, 1)[0])
    assert counts(ROWS, "length") == {"1024": {"invented": 1}, "4096": {"right": 2, "elsewhere": 1}}
    assert rates([], "kind") == {} and rate_of([]) == {"passed": 0, "n": 0}
