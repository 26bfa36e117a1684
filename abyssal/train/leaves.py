"""Tables in tables as one table: what metrics and state look like on one level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(table: Mapping[str, Any], between: str, head: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that is no table, in its order, named by the way to it.

    Args:
        table: with text keys.
        between: stands between the parts of a name.
        head: of all names.
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, between, f"{head}{key}{between}")
        else:
            yield f"{head}{key}", value
