"""Reads a caller's JSON schema: of each keyword what is sound and can be enforced."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from abyssal.base.errors import InputError
from abyssal.chat.constrain.kinds import KINDS, Schema, kind_of, own_kinds
from abyssal.chat.constrain.pattern import FORMATS, expression_of
from abyssal.chat.constrain.spelling import sane
from abyssal.chat.constrain.ways import Text

MOST_DEPTH = 48  # of schemas in schemas
MOST_STEP = 10_000  # digits of multipleOf as a number: llguidance has as many states
MOST_VALUE = 20_000  # characters of a value that a schema lists
MOST_BOUND, MOST_NEAR, LEAST_BOUND = 2**62, 10**17, 1e-15  # sizes of bounds that llguidance can hold
LISTS = ("allOf", "anyOf", "oneOf")
JOINS = ("$ref", *LISTS)
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# what they say cannot be told by a grammar
_REFUSED = (
    "not", "if", "then", "else", "contains", "uniqueItems", "propertyNames", "dependentSchemas", "dependencies",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
# of a schema that names no type, what it is about
ABOUT = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": (*BOUNDS, "multipleOf"),
}


class Reader:
    """The schema of one caller.

    Args:
        root: the schema; references point into it.
        label: what it is of, for errors.
        strict: refuse what cannot be enforced, instead of leaving it out.

    Attributes:
        targets: what references point to, by their pointers.
    """

    def __init__(self, root: Any, label: str, strict: bool):
        self.strict, self.label = strict, label
        self.targets: dict[str, Schema] = {}
        self._root = root
        self._waiting: list[str] = []

    def whole(self) -> Schema:
        """The schema, and with it the targets."""
        read = self._read(self._root, 0)
        while self._waiting:
            pointer = self._waiting.pop()
            self.targets[pointer] = self._read(self._pointed(pointer), 0)
        return read

    def refuse(self, problem: str) -> None:
        """What is left out, or an error if the caller is strict."""
        if self.strict:
            raise InputError(f"{self.label}: {problem}: change it or set strict to false")

    def _read(self, schema: Any, depth: int) -> Schema:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            self.refuse(f"{str(schema)[:60]!r} is no schema")
            return True
        if depth > MOST_DEPTH:
            self.refuse(f"schemas are nested more than {MOST_DEPTH} deep")
            return True
        read: dict[str, Any] = {}
        self._read_values(schema, read)
        self._read_bounds(schema, read)
        self._read_texts(schema, read)
        self._read_parts(schema, read, depth + 1)
        self._read_joins(schema, read, depth + 1)
        for keyword in _REFUSED:
            if keyword in schema and not (keyword in ("not", "uniqueItems") and schema[keyword] is False):
                self.refuse(f"{keyword} cannot be enforced")
        if "type" not in read and "enum" not in read and not any(key in read for key in JOINS):
            about = [kind for kind, keywords in ABOUT.items() if any(key in read for key in keywords)]
            if about:
                read["type"] = about
        return read or True

    def _read_values(self, schema: Mapping[str, Any], read: dict[str, Any]) -> None:
        """type, enum and const."""
        types = schema.get("type")
        listed = [types] if isinstance(types, str) else types
        if listed is not None:
            known = [t for t in listed if isinstance(t, str) and t in KINDS] if isinstance(listed, list) else []
            if not isinstance(listed, list) or len(known) < len(listed) or not known:
                self.refuse(f"type is {str(types)[:60]!r}")
            if known:
                nullable = ["null"] if schema.get("nullable") is True else []
                read["type"] = list(dict.fromkeys([*known, *nullable]))
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(values, list) or not values:
                self.refuse("enum is no list of values")
                return
            values = [value for value in values if _plain(value)]
            if not values:
                self.refuse("no value of enum can be written")
                return
            fit = [value for value in values if kind_of(value) <= own_kinds(read)]
            if not fit:
                self.refuse("type and enum exclude each other")
                read.pop("type", None)
            read["enum"] = fit or values

    def _read_texts(self, schema: Mapping[str, Any], read: dict[str, Any]) -> None:
        """Sizes, pattern and format."""
        for keyword in _SIZES:
            size = schema.get(keyword)
            if size is None:
                continue
            if not _is_number(size) or not 0 <= size < 2**31:
                self.refuse(f"{keyword} is {str(size)[:60]}")
            else:
                read[keyword] = math.ceil(size) if keyword.startswith("min") else int(size)
        self._exclude(read, zip(_SIZES[::2], _SIZES[1::2], strict=True))
        pattern = schema.get("pattern")
        if pattern is not None:
            expression = expression_of(pattern)
            own = Text(None, read.get("minLength", 0), read.get("maxLength"))
            if expression is None or own.both(Text(patterns=(expression,))) is None:
                self.refuse(f"pattern {str(pattern)[:60]!r} cannot be enforced")
            else:
                read["pattern"] = expression
        form = schema.get("format")
        if form is not None and self.strict:  # without strict it is a remark, as JSON Schema has it
            if isinstance(form, str) and form in FORMATS and "pattern" not in read:
                read["format"] = form
            elif "string" in own_kinds(read):
                self.refuse(f"format {str(form)[:60]!r} cannot be enforced")

    def _read_bounds(self, schema: Mapping[str, Any], read: dict[str, Any]) -> None:
        """How large numbers are, and of what they are multiples."""
        bounds = {key: schema[key] for key in BOUNDS if schema.get(key) is not None}
        for side in ("Minimum", "Maximum"):
            strictly = bounds.get(f"exclusive{side}")
            if isinstance(strictly, bool):  # draft 4
                bound = bounds.pop(side.lower(), None)
                bounds |= {f"exclusive{side}" if strictly else side.lower(): bound}
        for keyword, bound in bounds.items():
            if bound is None or bound is False:
                continue
            lower = keyword.endswith("inimum")
            far, near = (-MOST_BOUND, MOST_NEAR) if lower else (-MOST_NEAR, MOST_BOUND)
            if not _is_number(bound):
                self.refuse(f"{keyword} is {str(bound)[:60]}")
            elif (lower and bound > near) or (not lower and bound < far) or 0 < abs(bound) < LEAST_BOUND:
                self.refuse(f"{keyword} {bound:.3g} cannot be enforced")
            else:
                read[keyword] = max(far, min(near, bound))  # no number beyond is written
        self._exclude(read, [(small, large) for small in BOUNDS[::2] for large in BOUNDS[1::2]])
        low = max((read[key] for key in BOUNDS[::2] if key in read), default=-math.inf)
        high = min((read[key] for key in BOUNDS[1::2] if key in read), default=math.inf)
        whole = own_kinds(read) & KINDS["number"] == KINDS["integer"]
        first = low + 1 if low == read.get("exclusiveMinimum") and low == math.floor(low) else low
        last = high - 1 if high == read.get("exclusiveMaximum") and high == math.floor(high) else high
        if whole and last - first < 1 and math.ceil(first) > math.floor(last):
            self.refuse("no integer is between minimum and maximum")
            low, high = -math.inf, math.inf
            for keyword in BOUNDS:
                read.pop(keyword, None)
        step = schema.get("multipleOf")
        if step is not None:
            digits = _decimals(step) if _is_number(step) else 0
            # a multiple must be among the numbers for certain
            if not 0 < digits <= MOST_STEP or high - low < (digits if whole else step):
                self.refuse(f"multipleOf is {str(step)[:60]}")
            else:
                read["multipleOf"] = step

    def _exclude(self, read: dict[str, Any], pairs: Iterable[tuple[str, str]]) -> None:
        """Without those of a least and a most that leave nothing between them."""
        for small, large in pairs:
            if small in read and large in read:
                apart = float(read[large]) - float(read[small])
                if apart < 0 or (apart == 0 and "exclusive" in small + large):
                    self.refuse(f"{small} and {large} exclude each other")
                    del read[small], read[large]

    def _read_parts(self, schema: Mapping[str, Any], read: dict[str, Any], depth: int) -> None:
        """What objects and arrays hold."""
        properties = schema.get("properties")
        if isinstance(properties, Mapping):
            read["properties"] = {}
            for key, value in properties.items():
                read["properties"][str(key)] = self._read(value, depth)
        elif properties is not None:
            self.refuse("properties are no object")
        required = schema.get("required")
        if isinstance(required, list):
            names = [key for key in required if isinstance(key, str)]
            if len(names) < len(required):
                self.refuse(f"required is {str(required)[:60]}")
            if names:
                read["required"] = list(dict.fromkeys(names))
        elif required is not None:
            self.refuse(f"required is {str(required)[:60]}")
        others = schema.get("additionalProperties")
        if others is None and schema.get("unevaluatedProperties") is False:
            others = False
            if any(key in schema for key in (*JOINS, "if")):
                self.refuse("unevaluatedProperties of a combination cannot be enforced")
                others = None
        elif schema.get("unevaluatedProperties") is not None:
            self.refuse("unevaluatedProperties cannot be enforced")
        if others is not None:
            read["additionalProperties"] = self._read(others, depth)
        patterns = schema.get("patternProperties")
        if isinstance(patterns, Mapping):
            known = {found: value for key, value in patterns.items() if (found := expression_of(key)) is not None}
            if len(known) < len(patterns) or len(known) > 1:  # llguidance wants them to have no name in common
                self.refuse("patternProperties cannot be enforced")
            if known:
                found, value = next(iter(known.items()))
                read["patternProperties"] = {found: self._read(value, depth)}
        elif patterns is not None:
            self.refuse("patternProperties are no object")
        needs = schema.get("dependentRequired")
        if isinstance(needs, Mapping):
            read["dependentRequired"] = {
                key: [name for name in names if isinstance(name, str)]
                for key, names in needs.items()
                if isinstance(names, list)
            }
        elif needs is not None:
            self.refuse("dependentRequired is no object")
        items, first = schema.get("items"), schema.get("prefixItems")
        if isinstance(items, list):  # before 2020
            items, first = schema.get("additionalItems"), items
        if items is not None:
            read["items"] = self._read(items, depth)
        if isinstance(first, list) and first:
            read["prefixItems"] = [self._read(item, depth) for item in first]
        elif first is not None and first != []:
            self.refuse("prefixItems are no list")

    def _read_joins(self, schema: Mapping[str, Any], read: dict[str, Any], depth: int) -> None:
        """References and combinations."""
        for keyword in LISTS:
            ways = schema.get(keyword)
            if ways is None:
                continue
            if isinstance(ways, list) and ways:
                found = [self._read(way, depth) for way in ways]
                if keyword == "oneOf" and not self.strict:
                    keyword = "anyOf"
                if keyword in read:
                    read.setdefault("allOf", []).append({"anyOf": found})
                elif not (keyword == "allOf" and all(way is True for way in found)):
                    read[keyword] = found
            else:
                self.refuse(f"{keyword} is no list of schemas")
        target = schema.get("$ref")
        if target is not None:
            if isinstance(target, str) and self._pointed(target) is not None:
                if target not in self.targets:
                    self.targets[target] = True
                    self._waiting.append(target)
                read["$ref"] = target
            else:
                self.refuse(f"$ref {str(target)[:60]!r} points to nothing here")

    def _pointed(self, pointer: str) -> Any:
        """What a JSON pointer names in the root, or None."""
        if not pointer.startswith("#") or (pointer != "#" and pointer[1] != "/"):
            return None
        found = self._root
        for part in unquote(pointer[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(part)
            elif isinstance(found, list) and part.isdecimal() and len(part) < 9 and int(part) < len(found):
                found = found[int(part)]
            else:
                return None
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _decimals(step: float) -> int:
    """A number without its decimal point as llguidance finds it; 0 for one that is too small or not exact."""
    for _ in range(12):
        if step == math.floor(step) or step > MOST_STEP:
            return int(min(step, MOST_STEP + 1))
        step *= 10
    return 0


def _plain(value: Any) -> bool:
    """Whether JSON can hold a value, and a call; llguidance reads 128 levels."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return sane(text) and len(text) <= MOST_VALUE and text.count("[") + text.count("{") <= MOST_DEPTH
