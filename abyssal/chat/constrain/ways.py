"""Ways of being a string, or the arguments of a call, that can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from abyssal.chat.constrain.kinds import Schema
from abyssal.chat.constrain.pattern import Expression


@dataclass(frozen=True)
class Text:
    """One way of being a string: what all hold together.

    Attributes:
        values: the only ones, or None.
        patterns: expressions that the whole text must match.
    """

    values: tuple[str, ...] | None = None
    least: int = 0
    most: int | None = None
    patterns: tuple[Expression, ...] = ()

    def both(self, other: Text) -> Text | None:
        """What is both, or None if nothing is."""
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            known = set(other.values)
            values = tuple(value for value in self.values if value in known)
        most = min((m for m in (self.most, other.most) if m is not None), default=None)
        least = max(self.least, other.least)
        if values is not None:
            values = tuple(v for v in values if least <= len(v) and (most is None or len(v) <= most))
        patterns = tuple(dict.fromkeys(self.patterns + other.patterns))
        longest = min((p.most for p in patterns), default=math.inf)
        shortest = max((p.least for p in patterns), default=0)
        if values == () or max(least, shortest) > min(math.inf if most is None else most, longest):
            return None
        return Text(values, least, most, patterns)


@dataclass(frozen=True)
class Shape:
    """One way of being the arguments of a call.

    Attributes:
        properties: schemas by name.
        required: names.
        undeclared: what parameters of other names may be; None if no schema says.
        listed: whether a schema lists properties, be it none.
        dependent: names that must be there when another is.
        least, most: number of parameters.
        taken: names that no undeclared parameter may have.
    """

    properties: dict[str, Schema] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    undeclared: Schema | None = None
    listed: bool = False
    dependent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    least: int = 0
    most: int | None = None
    taken: tuple[str, ...] = ()

    def both(self, other: Shape) -> Shape:
        """What is both."""
        properties = dict(self.properties)
        for key, schema in other.properties.items():
            properties[key] = joined_of(properties[key], schema) if key in properties else schema
        undeclared = self.undeclared if other.undeclared is None else other.undeclared
        if self.undeclared is not None and other.undeclared is not None:
            undeclared = joined_of(self.undeclared, other.undeclared)
        return Shape(
            properties,
            self.required | other.required,
            undeclared,
            self.listed or other.listed,
            {**self.dependent, **other.dependent},
            max(self.least, other.least),
            min((m for m in (self.most, other.most) if m is not None), default=None),
        )


def loosest(ways: Sequence[Shape]) -> Shape:
    """What all of several ways allow, and no more than all of them require."""
    properties: dict[str, list[Schema]] = {}
    for way in ways:
        for key, schema in way.properties.items():
            known = properties.setdefault(key, [])
            known += [] if any(schema is other for other in known) else [schema]
    undeclared = [way.undeclared for way in ways if way.undeclared is not None]
    return Shape(
        {key: found[0] if len(found) == 1 else {"anyOf": found} for key, found in properties.items()},
        set.intersection(*(way.required for way in ways)),
        undeclared[0] if len(undeclared) == len(ways) else None,
        all(way.listed for way in ways),
    )


def joined_of(one: Schema, other: Schema) -> Schema:
    """What is both."""
    if one is other or other is True or one is False:
        return one
    return other if one is True or other is False else {"allOf": [one, other]}


def apart(parts: Sequence[Sequence[Text]]) -> bool:
    """Whether no string is in two of the parts, for all that can be told."""
    several = [part for part in parts if part]
    values = [value for part in several for value in {v for way in part for v in way.values or ()}]
    listed = all(way.values is not None for part in several for way in part)
    return len(several) < 2 or (listed and len(set(values)) == len(values))


def crossed(ones: Sequence[Text], others: Sequence[Text]) -> list[Text]:
    """What is both one of these and one of those."""
    return merged([both for one in ones for other in others if (both := one.both(other)) is not None])


def merged(ways: Sequence[Text]) -> list[Text]:
    """The same ways, all lists of values in one."""
    listed = dict.fromkeys(value for way in ways if way.values and not way.patterns for value in way.values)
    rest = list(dict.fromkeys(way for way in ways if not way.values or way.patterns))
    return [*rest, Text(tuple(listed))] if listed else rest
