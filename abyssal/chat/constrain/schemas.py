"""JSON schemas of one caller, lowered to the few keywords that are enforced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from abyssal.base.errors import InputError
from abyssal.chat.constrain.kinds import ALL, Schema, kind_of, own_kinds, types_of
from abyssal.chat.constrain.pattern import FORMATS, Expression
from abyssal.chat.constrain.reader import ABOUT, BOUNDS, JOINS, LISTS, Reader
from abyssal.chat.constrain.spelling import FREE, sane, sized, writable
from abyssal.chat.constrain.ways import Shape, Text, apart, crossed, loosest, merged

MOST_PARAMETERS = 500  # of one tool; its stack overflows at several thousand
MOST_SPREAD = 600  # parameters of all alternatives of a tool together
MOST_WAYS = 32  # alternatives that are told apart
MOST_LEVELS = 600  # of schemas with all that they refer to: llguidance has a stack that overflows beyond about 2,000
MOST_LEAST = 8  # characters that a text must have: beyond, llguidance cannot tell whether two expressions share one
MOST_LISTED = 400  # properties of a nested object, which llguidance keeps all in sight
_DEFS, _ANY = "#/$defs/", "any"  # the definition of JSON of any kind, all strings in it spared
_Way = TypeVar("_Way")


class Schemas:
    """The schemas of one caller, in the few keywords that are enforced.

    Args:
        root: the caller's schema; references point into it.
        label: what it is of, for errors.
        strict: refuse what cannot be enforced, instead of leaving it out.
        text: an expression for what strings may hold.
    """

    def __init__(self, root: Any, label: str, strict: bool, text: str):
        reader = Reader(root, label, strict)
        self.strict, self.refuse = strict, reader.refuse
        self._label, self._spare = label, f"^({text})$"
        self._kinds: dict[int, tuple[Schema, frozenset[str]]] = {}
        self._texts: dict[str, list[Text]] = {}
        self._shapes: dict[str, list[Shape]] = {}
        self._lowered: dict[str, Schema] = {}
        self.root = reader.whole()
        self._targets = reader.targets
        self._numbers = {pointer: i for i, pointer in enumerate(self._targets)}
        self._target_kinds = dict.fromkeys(self._targets, frozenset[str]())
        self._settle()

    # which kinds of values a schema has

    def _settle(self) -> None:
        """Kinds of what references point to: the least that agree, as they may point in circles."""
        users: dict[str, list[str]] = {pointer: [] for pointer in self._targets}
        for pointer, target in self._targets.items():
            for other in set(references(target)):
                users[other].append(pointer)
        waiting = dict.fromkeys(reversed(self._targets))
        while waiting:
            pointer = next(iter(waiting))
            del waiting[pointer]
            self._kinds.clear()
            kinds = self.kinds(self._targets[pointer])
            if kinds != self._target_kinds[pointer]:
                self._target_kinds[pointer] = kinds
                waiting.update(dict.fromkeys(users[pointer]))
        self._kinds.clear()

    def kinds(self, schema: Schema) -> frozenset[str]:
        """The kinds of values that may match, at most."""
        if isinstance(schema, bool):
            return ALL if schema else frozenset()
        known = self._kinds.get(id(schema))
        if known is not None:
            return known[1]
        kinds = own_kinds(schema)
        if "enum" in schema:
            kinds &= frozenset().union(*(kind_of(value) for value in schema["enum"]))
        if "$ref" in schema:
            kinds &= self._target_kinds[schema["$ref"]]
        for part in schema.get("allOf", ()):
            kinds &= self.kinds(part)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                kinds &= frozenset().union(*(self.kinds(part) for part in schema[keyword]))
        properties = schema.get("properties", {})
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        if any(not self.kinds(properties.get(key, others)) for key in schema.get("required", ())):
            kinds -= {"object"}
        first, least = schema.get("prefixItems", []), schema.get("minItems", 0)
        needed = first[:least] + ([schema.get("items", True)] if least > len(first) else [])
        if not all(map(self.kinds, needed)):
            kinds -= {"array"}
        self._kinds[id(schema)] = schema, kinds
        return kinds

    # values of parameters

    def values(self, schema: Schema) -> tuple[list[Text], Schema | None]:
        """The ways in which a value may be a string, and a schema of those that are none, or None without any."""
        texts, other = self._texts_of(schema), self._without_text(schema)
        if not texts and other is None:
            self.refuse("a schema excludes every value")
            return self.values(True)
        return texts, other

    def _texts_of(self, schema: Schema) -> list[Text]:
        if isinstance(schema, bool):
            return [Text()] if schema else []
        if "string" not in self.kinds(schema):
            return []
        patterns = [schema["pattern"]] if "pattern" in schema else []
        if "format" in schema:
            patterns.append(Expression(*FORMATS[schema["format"]]))
        values = None
        if "enum" in schema:
            values = tuple(dict.fromkeys(v for v in schema["enum"] if isinstance(v, str) and sane(v)))
        own = Text(None, schema.get("minLength", 0), schema.get("maxLength"), tuple(patterns))
        ways = crossed([own], [Text(values)])
        if "$ref" in schema:
            pointer = schema["$ref"]
            if pointer not in self._texts:
                self._texts[pointer] = []  # a circle adds nothing
                self._texts[pointer] = self._texts_of(self._targets[pointer])
            ways = crossed(ways, self._texts[pointer])
        for part in schema.get("allOf", ()):
            ways = self._few(crossed(ways, self._texts_of(part)))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                parts = [self._texts_of(part) for part in schema[keyword]]
                if keyword == "oneOf" and not apart(parts):
                    self.refuse("oneOf of strings cannot be enforced")
                ways = self._few(crossed(ways, self._few(merged([way for part in parts for way in part]))))
        return [self._told(way) for way in ways]

    def _told(self, way: Text) -> Text:
        """A way whose parts together match something for certain, or an answer could not go on."""
        if not way.patterns:
            return way
        if way.values or len(way.patterns) > 1:
            self.refuse("a pattern beside another, a format or an enum cannot be enforced")
        if way.values:
            return replace(way, patterns=())
        least, most = self._beside(way.patterns[0], way.least, way.most)
        return Text(None, least, most, way.patterns[:1])

    def _beside(self, pattern: Expression, least: int, most: int | None) -> tuple[int, int | None]:
        """What of a least and a most length is to be held beside a pattern."""
        if pattern.least >= least and (most is None or pattern.most <= most):
            return 0, None
        if max(least, pattern.least) > MOST_LEAST:
            self.refuse("a pattern beside minLength or maxLength cannot be enforced")
            return 0, None
        return least, most

    def _few(self, ways: list[_Way]) -> list[_Way]:
        if len(ways) > MOST_WAYS:
            self.refuse(f"more than {MOST_WAYS} alternatives cannot be told apart")
        return ways[:MOST_WAYS]

    def _without_text(self, schema: Schema) -> Schema | None:
        kinds = self.kinds(schema) - {"string"}
        if not kinds:
            return None
        if isinstance(schema, bool):
            return {"type": types_of(kinds)}
        if "string" not in self.kinds(schema):
            return schema
        for keyword in ("anyOf", "oneOf"):
            if list(schema) == [keyword]:
                left = [other for part in schema[keyword] if (other := self._without_text(part)) is not None]
                return left[0] if len(left) == 1 else {keyword: left}
        if any(key in schema for key in JOINS):
            return {"type": types_of(kinds), "allOf": [schema]}
        rest = {key: value for key, value in schema.items() if key not in (*ABOUT["string"], "enum")}
        if "enum" in schema:
            rest["enum"] = [value for value in schema["enum"] if not isinstance(value, str)]
        return {**rest, "type": types_of(kinds)}

    # arguments

    def shapes(self) -> list[Shape]:
        """The ways in which the root describes the arguments of a call."""
        if self.root is not False and "object" not in self.kinds(self.root):
            self.refuse("no arguments fit its parameters")
        ways = self._shapes_of(self.root)
        if len(ways) > 1 and sum(len(way.properties) for way in ways) > MOST_SPREAD:
            self.refuse("so many alternatives of so many parameters cannot be enforced")
            ways = [loosest(ways)]
        return [self._finished(way) for way in ways]

    def _shapes_of(self, schema: Schema) -> list[Shape]:
        if isinstance(schema, bool):
            return [Shape()] if schema else []
        for keyword in ("enum", "patternProperties"):
            if keyword in schema:
                self.refuse(f"{keyword} of parameters cannot be enforced")
        ways = [
            Shape(
                dict(schema.get("properties", {})),
                set(schema.get("required", ())),
                schema.get("additionalProperties"),
                "properties" in schema,
                {key: tuple(names) for key, names in schema.get("dependentRequired", {}).items()},
                schema.get("minProperties", 0),
                schema.get("maxProperties"),
            )
        ]
        if "$ref" in schema:
            pointer = schema["$ref"]
            if pointer not in self._shapes:
                self._shapes[pointer] = []
                self._shapes[pointer] = self._shapes_of(self._targets[pointer])
            ways = self._few([way.both(other) for way in ways for other in self._shapes[pointer]])
        for part in schema.get("allOf", ()):
            ways = self._few([way.both(other) for way in ways for other in self._shapes_of(part)])
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                parts = [part for part in schema[keyword] if "object" in self.kinds(part)]
                if keyword == "oneOf" and len(parts) > 1:
                    self.refuse("oneOf of parameters cannot be enforced")
                others = self._few([other for part in parts for other in self._shapes_of(part)])
                ways = self._few([way.both(other) for way in ways for other in others])
        return ways

    def _finished(self, shape: Shape) -> Shape:
        """A shape that a call can always be brought to."""
        undeclared, listed = shape.undeclared, shape.listed or bool(shape.properties)
        if undeclared is None:
            undeclared = not listed  # who lists parameters means these
        properties = dict(shape.properties)
        for key in sorted(shape.required - set(properties)):
            properties[key] = undeclared or True
        for key, schema in list(properties.items()):
            if schema is False and key not in shape.required:
                del properties[key]
            elif not writable(key):
                if key in shape.required or self.strict:
                    raise InputError(f"{self._label}: parameter {key[:60]!r} cannot be written in DSML: rename it")
                del properties[key]
        if len(properties) > MOST_PARAMETERS:
            self.refuse(f"more than {MOST_PARAMETERS} parameters cannot be enforced")
            first = [*(key for key in properties if key in shape.required), *properties][:MOST_PARAMETERS]
            if shape.required - set(first):
                raise InputError(
                    f"{self._label} requires {len(shape.required)} parameters: give {MOST_PARAMETERS} at most"
                )
            properties = {key: properties[key] for key in properties if key in set(first)}
        open_ = not self.strict and bool(self.kinds(undeclared))
        least, most = shape.least, shape.most
        dependent = {
            key: tuple(name for name in names if name in properties)
            for key, names in shape.dependent.items()
            if key in properties
        }
        if least > len(properties):
            self.refuse(f"minProperties is {least} of {len(properties)} parameters")
            least = len(properties)
        if most is not None and (most < len(shape.required) or any(dependent.values())):
            self.refuse(f"maxProperties {most} cannot be enforced")
            most = None
        if most == len(shape.required):
            properties = {key: schema for key, schema in properties.items() if key in shape.required}
        return replace(
            shape,
            properties=properties,
            undeclared=undeclared if open_ else None,
            dependent={key: names for key, names in dependent.items() if names and key in properties},
            least=0 if open_ else min(least, len(properties)),
            most=None if open_ else most,
            taken=tuple(key for key in shape.properties if writable(key)),
        )

    # lowering: what llguidance gets to see

    def document(self, schema: Schema) -> dict[str, Any]:
        """A schema of JSON text with all that it refers to."""
        lowered = self._lower(schema)
        whole: dict[str, Any] = dict(lowered) if isinstance(lowered, dict) else {"allOf": [lowered]}
        needed: dict[str, Schema] = {}
        waiting, levels = [lowered], 0
        while waiting:
            part = waiting.pop()
            levels += _levels(part)
            if levels > MOST_LEVELS:
                self.refuse("schemas refer to too many others")
                return self.document(self.any_like(schema))
            for name in (target.removeprefix(_DEFS) for target in references(part)):
                if name not in needed:
                    needed[name] = self._definition(name)
                    waiting.append(needed[name])
        if needed:
            whole["$defs"] = needed
        whole["x-guidance"] = {
            "whitespace_flexible": False,
            "item_separator": ", ",
            "key_separator": ": ",
            "lenient": not self.strict,
        }
        return whole

    def any_like(self, schema: Schema) -> Schema:
        """A small schema of the same kinds of values."""
        return {"type": types_of(self.kinds(schema))}

    def _definition(self, name: str) -> Schema:
        """A lowered schema that others refer to."""
        if name not in self._lowered:
            if name == _ANY:
                self._lowered[name] = self._lower_alone({"type": types_of(ALL)}, False)
            else:
                number, _, joined = name.partition("-")
                self._lowered[name] = self._lower(list(self._targets.values())[int(number)], bool(joined))
        return self._lowered[name]

    def _lower(self, schema: Schema, joined: bool = False) -> Schema:
        """A schema for llguidance, whose strings are spared.

        Where schemas are joined, llguidance intersects them. It would not come to an end with two that hold
        each any JSON, so there what is open stays open, not spared.
        """
        if isinstance(schema, bool):
            return schema if joined or not schema else {"$ref": _DEFS + _ANY}
        if not self.kinds(schema):
            self.refuse("a schema excludes every value")
            return self._lower(True, joined)
        joins = [key for key in JOINS if key in schema]
        if not joins:
            return self._lower_alone(schema, joined)
        if list(schema) == ["allOf"] and len(schema["allOf"]) == 1:
            return self._lower(schema["allOf"][0], joined)
        own = {key: value for key, value in schema.items() if key not in joins}
        joined = joined or len(joins) > 1 or len(schema.get("allOf", ())) > 1 or bool(set(own) - {"type"})
        lowered: dict[str, Any] = {}
        if set(own) == {"type"}:
            lowered["type"] = own["type"]
        elif own:
            lowered = self._lower_alone({"type": types_of(ALL), **own}, joined)
        for keyword in LISTS:
            parts = [part for part in schema.get(keyword, ()) if keyword == "allOf" or self.kinds(part)]
            if parts:
                lowered[keyword] = lowered.get(keyword, []) + [self._lower(part, joined) for part in parts]
        if "$ref" in schema:
            lowered["$ref"] = f"{_DEFS}{self._numbers[schema['$ref']]}{'-joined' if joined else ''}"
        return lowered

    def _lower_alone(self, schema: dict[str, Any], joined: bool) -> dict[str, Any]:
        """A schema without references and combinations."""
        kinds = self.kinds(schema)
        if "enum" in schema:
            return {"enum": schema["enum"]}
        lowered: dict[str, Any] = {"type": types_of(kinds)}
        if "string" in kinds:
            self._lower_text(schema, lowered)
        if "array" in kinds:
            copied = ("minItems", "maxItems")
            lowered |= {key: schema[key] for key in copied if key in schema}
            if "prefixItems" in schema:
                lowered["prefixItems"] = [self._lower(item, joined) for item in schema["prefixItems"]]
            lowered["items"] = self._lower(schema.get("items", True), joined)
        if "object" in kinds:
            self._lower_object(schema, lowered, joined)
        if kinds & {"integer", "number"}:
            lowered |= {key: schema[key] for key in BOUNDS if key in schema}
            if "multipleOf" in schema and joined:  # two of them would have their states multiplied
                self.refuse("multipleOf in a combination cannot be enforced")
            elif "multipleOf" in schema:
                lowered["multipleOf"] = schema["multipleOf"]
        return lowered

    def _lower_text(self, schema: dict[str, Any], lowered: dict[str, Any]) -> None:
        """One expression where one can do: llguidance must find out whether several have a text in common."""
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if "format" in schema:
            lowered["format"] = schema["format"]
            least, most = self._beside(Expression(*FORMATS[schema["format"]]), least, most)
        elif "pattern" in schema:
            lowered["pattern"] = f"^({schema['pattern'].text})$"
            least, most = self._beside(schema["pattern"], least, most)
        elif least > MOST_LEAST:
            lowered["pattern"] = f"^{FREE}{sized(least, most)}$"
            least, most = 0, None
        else:
            lowered["pattern"] = self._spare
        if least:
            lowered["minLength"] = least
        if most is not None:
            lowered["maxLength"] = most

    def _lower_object(self, schema: dict[str, Any], lowered: dict[str, Any], joined: bool) -> None:
        properties, required = dict(schema.get("properties", {})), list(schema.get("required", []))
        for key in [key for key in (*properties, *required) if not sane(key)]:
            self.refuse(f"property {key[:60]!r} cannot be written")
            properties.pop(key, None)
            required = [other for other in required if other != key]
        if "dependentRequired" in schema:
            self.refuse("dependentRequired of a nested object cannot be enforced")
        if len(properties) > MOST_LISTED:
            self.refuse(f"more than {MOST_LISTED} properties of a nested object cannot be enforced")
            properties = {key: value for key, value in properties.items() if key in required[:MOST_LISTED]}
            schema = {"additionalProperties": True, **schema}
        if properties:
            lowered["properties"] = {key: self._lower(value, joined) for key, value in properties.items()}
        if required:
            lowered["required"] = required
        patterns = schema.get("patternProperties")
        if patterns:
            lowered["patternProperties"] = {
                f"^({pattern.text})$": self._lower(value, joined) for pattern, value in patterns.items()
            }
        others = schema.get("additionalProperties")
        if others is None and properties and not patterns and not joined and all(key in properties for key in required):
            others = False  # who lists properties means these
        if joined or patterns or others is False:
            if others is not None:
                lowered["additionalProperties"] = self._lower(others, joined)
        elif properties or required:
            lowered["additionalProperties"] = self._lower(True if others is None else others)
        else:  # names are spared too; beside properties, llguidance would intersect these with the others
            lowered["patternProperties"] = {self._spare: self._lower(True if others is None else others)}
            lowered["additionalProperties"] = False
        if self.strict or all(key in required for key in properties):
            lowered |= {key: schema[key] for key in ("minProperties", "maxProperties") if key in schema}


def references(schema: Any) -> list[str]:
    """What a schema refers to."""
    if isinstance(schema, list):
        return [target for part in schema for target in references(part)]
    if not isinstance(schema, dict):
        return []
    parts = [part for key, part in schema.items() if key != "enum" or isinstance(part, dict)]  # values hold none
    found = [target for part in parts for target in references(part)]
    return [*found, schema["$ref"]] if isinstance(schema.get("$ref"), str) else found


def _levels(schema: Any) -> int:
    """How deep lists and objects are nested."""
    if isinstance(schema, dict | list):
        return 1 + max(map(_levels, schema.values() if isinstance(schema, dict) else schema), default=0)
    return 0
