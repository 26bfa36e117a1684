"""The kinds of values that a JSON schema tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Schema = bool | dict[str, Any]
KINDS = {
    "null": frozenset({"null"}),
    "boolean": frozenset({"boolean"}),
    "integer": frozenset({"integer"}),
    "number": frozenset({"integer", "number"}),
    "string": frozenset({"string"}),
    "array": frozenset({"array"}),
    "object": frozenset({"object"}),
}
ALL = frozenset(KINDS)


def types_of(kinds: Iterable[str]) -> list[str]:
    """Kinds as a list of types."""
    return [kind for kind in KINDS if kind in kinds and not (kind == "integer" and "number" in kinds)]


def kind_of(value: Any) -> frozenset[str]:
    """The kind of a value."""
    if value is None:
        return KINDS["null"]
    if isinstance(value, bool):
        return KINDS["boolean"]
    if isinstance(value, int | float):
        return frozenset({"integer" if value == int(value) else "number"})
    return KINDS["string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"]


def own_kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    """The kinds that a schema itself names."""
    types = schema.get("type")
    return ALL if types is None else frozenset().union(*(KINDS[name] for name in types))
