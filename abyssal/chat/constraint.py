"""What binds an answer: calls in the form of encoding.md 3, typed by their tools, or JSON of a schema. Text alone.

The grammar is written in llguidance's dialect of Lark, in three layers:

- `_Calls` writes the block of calls. Parameters come in any order, each at most once, the required ones always:
  a rule carries the set of those that are there as bits (llguidance's parametric rules).
- `_Schemas` reads the JSON schemas of one caller and lowers them to the few keywords that are enforced. What a
  strict schema asks for beyond them is an error, what a lenient one asks for is left out. A value may be a string,
  which DSML writes raw, or anything else, which it writes as JSON; a schema that allows both gives both spellings.
- `_Pattern` turns a schema's regular expression into one of llguidance's, which has neither search nor anchors.

All that a model may write freely is `_spared`: it cannot spell a mark with ordinary tokens, at which the parser
would end the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import unquote

from abyssal.base.errors import InputError
from abyssal.chat.api import Constraint, ToolMode
from abyssal.encoding.dsml import BEFORE_CALLS
from abyssal.encoding.literals import DSML, EOS, SPECIAL_TOKENS, THINK_END
from abyssal.encoding.tokenizer import Piece

MOST_TOOLS = 1_000  # llguidance keeps 2,000 possibilities in sight
MOST_PARAMETERS = 500  # of one tool; its stack overflows at several thousand
MOST_NAME = 1024  # characters of a name; the parser gives up on a tag of 2,048
MOST_UNDECLARED = 4  # parameters that no schema declares, of one call
MOST_SPREAD = 600  # parameters of all alternatives of a tool together
MOST_BITS = 56  # parameters whose set fits into a rule's 64 bits, beside the counter of undeclared ones
MOST_WAYS = 32  # alternatives that are told apart
MOST_DEPTH = 48  # of schemas in schemas
MOST_JSON = 400_000  # characters of schemas, beyond which parameters of lenient tools may be any JSON
MOST_LEVELS = 600  # of schemas with all that they refer to: llguidance has a stack that overflows beyond about 2,000
MOST_REPEATS = 100_000  # of a part of a pattern
MOST_LEAST = 8  # characters that a text must have: beyond, llguidance cannot tell whether two expressions share one
MOST_LISTED = 400  # properties of a nested object, which llguidance keeps all in sight
MOST_STEP = 10_000  # digits of multipleOf as a number: llguidance has as many states
MOST_VALUE = 20_000  # characters of a value that a schema lists
MOST_BOUND, MOST_NEAR, LEAST_BOUND = 2**62, 10**17, 1e-15  # sizes of bounds that llguidance can hold

_Schema = bool | dict[str, Any]
_Way = TypeVar("_Way")
_KINDS = {
    "null": frozenset({"null"}),
    "boolean": frozenset({"boolean"}),
    "integer": frozenset({"integer"}),
    "number": frozenset({"integer", "number"}),
    "string": frozenset({"string"}),
    "array": frozenset({"array"}),
    "object": frozenset({"object"}),
}
_ALL = frozenset(_KINDS)
_NONE = {"type": "object", "properties": {}, "additionalProperties": False}
_ENTRY = "\0"  # in grammar text: the DSML token
_RAW, _AS_JSON = '"true">', '"false">'  # how the opening tag of a parameter ends
_UNDECLARED = "[60:63]"  # bits that count parameters that no schema declares


def constraint_of(
    *,
    tools: Sequence[Mapping[str, Any]],
    mode: ToolMode,
    name: str | None,
    parallel: bool,
    schema: Mapping[str, Any] | None,
    schema_strict: bool,
    thinking: bool,
) -> Constraint | None:
    """What binds an answer, or None if nothing has to.

    Args:
        tools: function objects.
        mode: whether they may, must not or must be called.
        name: the one that must be, if `mode` is "required"; None for any.
        parallel: whether an answer may make several calls.
        schema: what the content must match unless calls are made, or None.
        schema_strict: refuse a schema that cannot be enforced whole.
        thinking: the answer begins with reasoning.
    Raises:
        InputError: no answer can be as asked, or a strict schema cannot be enforced.
    """
    try:
        return _constraint(tools, mode, name, parallel, schema, schema_strict, thinking)
    except RecursionError:
        raise InputError("schemas of this request refer to each other too deeply: make them flatter") from None


def _constraint(
    tools: Sequence[Mapping[str, Any]],
    mode: ToolMode,
    name: str | None,
    parallel: bool,
    schema: Mapping[str, Any] | None,
    schema_strict: bool,
    thinking: bool,
) -> Constraint | None:
    after = (THINK_END,) if thinking else ()
    declared = {str(tool["name"]): tool for tool in tools} if mode != "none" else {}
    if mode == "required":
        if not declared:
            raise InputError("a tool must be called but none is declared: give tools, or tool_choice auto")
        if name is not None:
            if name not in declared:
                raise InputError(f"tool {name!r} must be called but is not declared: use {', '.join([*declared][:10])}")
            declared = {name: declared[name]}
    if schema is None or mode == "required":
        if not declared:
            return None
        grammar = _Calls(declared, parallel)
        if mode == "auto":
            return Constraint(grammar.pieces("start: calls"), (*after, DSML))
        lead = f'{BEFORE_CALLS}<{DSML}tool_calls>\n<{DSML}invoke name="'
        if len(declared) == 1:
            lead += f'{next(iter(declared))}">\n'
        return Constraint(grammar.pieces(f"start: {_BLOCK}"), after, lead)
    grammar = _Calls(declared, parallel)
    content = grammar.content(schema, schema_strict)
    if declared:
        return Constraint(grammar.pieces(f"start: {content} | {_BLOCK}"), after)
    return Constraint(grammar.pieces(f"start: {content}"), after, schema=schema)


def lark_text(grammar: Iterable[Piece], special: Callable[[str], int]) -> str:
    """A grammar as llguidance reads it, its special tokens by number.

    Args:
        grammar: of a `Constraint`.
        special: the id of a special token.
    """
    return "".join(f"<[{special(piece.text)}]>" if piece.special else piece.text for piece in grammar)


def _literal(text: str) -> str:
    """A string in Lark, which is one of JSON."""
    return json.dumps(text).replace("\x7f", "\\u007f")


_BLOCK = f"{_literal(f'{BEFORE_CALLS}<')} {_ENTRY} calls"


def _hex(char: str) -> str:
    """A character in a regular expression."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


_BAR = "｜"
_FREE = f"[^{_hex(_BAR)}]"


def _sized(least: int, most: int | None) -> str:
    """How often, in a regular expression."""
    return f"{{{least},{'' if most is None else most}}}"


def _spared(words: Iterable[str]) -> str:
    """An expression for text in which nothing between two bars begins with one of the words."""

    def but(words: set[str]) -> str:
        heads = sorted({word[0] for word in words})
        ways = ["", f"[^{_hex(_BAR)}{''.join(map(_hex, heads))}]{_FREE}*"]
        for head in heads:
            rests = {word[1:] for word in words if word[0] == head}
            ways += [] if "" in rests else [_hex(head) + but(rests)]
        return f"({'|'.join(ways)})"

    return f"{_FREE}*({_hex(_BAR)}({but(set(words))}{_hex(_BAR)})*{_FREE}*)?"


_TEXT = _spared((DSML[1:5], EOS[2:6]))  # in a call, other tokens that are spelled out do no harm
_CONTENT = _spared(token.split("｜")[1] for token in SPECIAL_TOKENS if "｜" in token)


def _sane(text: str) -> bool:
    """Whether text can be written within a call: it has an encoding and no mark."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in text) and DSML not in text and EOS not in text


def _writable(name: str) -> bool:
    """Whether a name can stand in a tag."""
    return _sane(name) and '"' not in name and len(name) <= MOST_NAME


# Calls


class _Calls:
    """The rules of a block of calls.

    Args:
        tools: by name.
        parallel: whether there may be several calls.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], parallel: bool):
        self._names: dict[str, str] = {}  # what stands behind a rule's or terminal's name -> the name
        self._rules: list[str] = []
        self._left = MOST_JSON
        if not tools:
            return
        if len(tools) > MOST_TOOLS:
            raise InputError(f"{len(tools)} tools are declared: give at most {MOST_TOOLS}")
        calls = [self._tool(name, tool) for name, tool in tools.items()]
        close = f'"</" {_ENTRY} "tool_calls>"'
        self._rules += [
            f'calls: "tool_calls>\\n" call{"+" if parallel else ""} {close}',
            f'call: "<" {_ENTRY} ({" | ".join(calls)})',
        ]

    def pieces(self, start: str) -> tuple[Piece, ...]:
        """The grammar."""
        text = "\n".join([start, *self._rules, *(f"{name}: {body}" for body, name in self._names.items())])
        parts: list[Piece] = []
        for part in text.split(_ENTRY):
            parts += [Piece(part), Piece(DSML, special=True)]
        return tuple(parts[:-1])

    def content(self, schema: Any, strict: bool) -> str:
        """The rule of an answer that is JSON."""
        if not isinstance(schema, Mapping | bool):
            raise InputError(f"the response schema is {type(schema).__name__}: give a JSON schema")
        schemas = _Schemas(schema, "the response schema", strict, _CONTENT)
        self._left = MOST_JSON
        return self._json(schemas, schemas.root)

    def _named(self, kind: str, body: str) -> str:
        """The name of a rule or terminal with this body; the same bodies share one."""
        return self._names.setdefault(body, f"{kind}{len(self._names)}")

    def _json(self, schemas: _Schemas, schema: _Schema) -> str:
        text = json.dumps(schemas.document(schema), allow_nan=False)
        if f"%json {text}" not in self._names:
            if len(text) > self._left and not schemas.strict:
                text = json.dumps(schemas.document(schemas.any_like(schema)))
            self._left -= len(text)
        return self._named("j", f"%json {text}")

    def _tool(self, name: str, tool: Mapping[str, Any]) -> str:
        if not _writable(name):
            raise InputError(f"tool name {name[:100]!r} cannot be written in DSML: use letters, digits, _ and -")
        strict = bool(tool.get("strict"))
        parameters = tool.get("parameters") or tool.get("input_schema")
        if parameters is None:
            parameters = _NONE if tool.get("parameters") is None else tool["parameters"]
        if not isinstance(parameters, Mapping | bool):
            raise InputError(
                f"parameters of tool {name!r} are {type(parameters).__name__}: give a JSON schema of an object"
            )
        required = parameters.get("required") if isinstance(parameters, Mapping) else None
        if isinstance(required, list) and not all(isinstance(key, str) for key in required):
            raise InputError(f"required of tool {name!r} holds {required!r}: give names of parameters")
        schemas = _Schemas(parameters, f"tool {name!r}", strict, _TEXT)
        shapes = schemas.shapes()
        if not shapes:
            raise InputError(f"no arguments fit the parameters of tool {name!r}: give a schema of an object")
        heads = _literal(f'invoke name="{name}">\n')
        bodies = [self._shape(schemas, shape) for shape in shapes]
        return f"{heads} ({' | '.join(dict.fromkeys(bodies))})"

    def _shape(self, schemas: _Schemas, shape: _Shape) -> str:
        """All that may follow the opening tag of a call."""
        values = {key: self._value(schemas, key, ways) for key, ways in shape.properties.items()}
        first = [key for key in values if key in shape.required]  # the bits of these are the lowest
        keys = first + [key for key in values if key not in shape.required]
        n, r = len(keys), len(first)
        end = f'"</" {_ENTRY} "invoke>\\n"'
        ways = [] if r or shape.least else [f'"\\n" {end}']
        extra = None if shape.undeclared is None else self._undeclared(schemas, shape.undeclared, shape.taken)
        if n > MOST_BITS:
            if shape.least > r or shape.most is not None or shape.dependent:
                schemas.refuse(f"more than {MOST_BITS} parameters and how many of them cannot both be enforced")
            return self._in_order(values, shape.required, ways, end)
        if not n and extra is None:
            return " | ".join(ways)
        room = n - r if shape.most is None else min(n, shape.most) - r  # what is required has its place
        more, done = [], []
        if r:
            more.append(f"not(is_ones([0:{r}]))")
            done.append(f"is_ones([0:{r}])")
        if n > r:
            more.append(f"bit_count_lt([{r}:{n}], {room})")
        if extra is not None:
            more.append(f"lt({_UNDECLARED}, {MOST_UNDECLARED})")
        if shape.least > r:
            done.append(f"bit_count_ge([0:{n}], {shape.least})")
        bit = {key: i for i, key in enumerate(keys)}
        for key, others in shape.dependent.items():
            needs = _all("and", [f"bit_set({bit[other]})" for other in others])
            done.append(f"or(bit_clear({bit[key]}), {needs})")
        number = len(self._rules)
        one, next_ = f"one{number}", f"next{number}"
        choices = [
            f"{values[key]} {next_}::set_bit({bit[key]}) %if "
            + (f"bit_clear({bit[key]})" if bit[key] < r else f"and(bit_clear({bit[key]}), {more[bool(r)]})")
            for key in keys
        ]
        if extra is not None:
            choices.append(f"{extra} {next_}::incr({_UNDECLARED}) %if lt({_UNDECLARED}, {MOST_UNDECLARED})")
        finish = f" %if {_all('and', done)}" if done else ""
        self._rules += [
            f"{one}::_ : " + "\n | ".join(choices),
            f'{next_}::_ : "<" {_ENTRY} {one}::_ %if {_all("or", more)}\n | {end}{finish}',
        ]
        return " | ".join([*ways, f'"<" {_ENTRY} {one}::0x0'])

    def _in_order(self, values: Mapping[str, str], required: set[str], ways: list[str], end: str) -> str:
        """Parameters of a call that has too many of them to come in any order."""
        number, last = len(self._rules), len(values)
        rules = [f"at{number}-{last}: {end}"]
        for i, (key, value) in enumerate(values.items()):
            skip = "" if key in required else f" | at{number}-{i + 1}"
            rules.append(f'at{number}-{i}: "<" {_ENTRY} {value} at{number}-{i + 1}{skip}')
        self._rules += rules
        if required:
            return " | ".join([*ways, f"at{number}-0"])
        # not through at-0: a call without any has another end
        starts = [f'"<" {_ENTRY} {value} at{number}-{i + 1}' for i, value in enumerate(values.values())]
        return " | ".join([*ways, *starts])

    def _value(self, schemas: _Schemas, key: str, schema: _Schema) -> str:
        """A declared parameter with its value."""
        head = f'parameter name="{key}" string='
        return self._named("v", " | ".join(self._spellings(schemas, schema, lambda kind: _literal(head + kind))))

    def _undeclared(self, schemas: _Schemas, schema: _Schema, others: Sequence[str]) -> str:
        """A parameter that no schema declares; its whole tag is one terminal, as lexing does not go back."""
        taken = f" & ~({' | '.join(map(_literal, others))})" if others else ""
        name = f'"parameter name=\\"" (/[^\\x{{22}}\\x{{3c}}\\x{{3e}}\\x{{a}}\\x{{ff5c}}]{{1,64}}/{taken}) '
        tags = {kind: self._named("N", name + _literal(f'" string={kind}')) for kind in (_RAW, _AS_JSON)}
        return self._named("v", " | ".join(self._spellings(schemas, schema, tags.__getitem__)))

    def _spellings(self, schemas: _Schemas, schema: _Schema, tag: Callable[[str], str]) -> list[str]:
        """A value raw, as JSON, or both; `tag` gives the end of its opening tag."""
        close = f'{_ENTRY} "parameter>\\n"'
        texts, other = schemas.values(schema)
        spelled = []
        if texts:
            # the longest match goes on to the token, so that text may hold "</"
            terminal = self._named("T", f'({" | ".join(map(self._text, texts))}) "</"')
            spelled.append(f"{tag(_RAW)} {terminal} {close}")
        if other is not None:
            spelled.append(f'{tag(_AS_JSON)} {self._json(schemas, other)} "</" {close}')
        return spelled

    @staticmethod
    def _text(text: _Text) -> str:
        if text.values is not None:
            return " | ".join(map(_literal, text.values))
        if not text.patterns and text.least > MOST_LEAST:
            return f"/{_FREE}{_sized(text.least, text.most)}/"
        pattern = f"/{text.patterns[0].text if text.patterns else _TEXT}/"
        bounded = text.least or text.most is not None
        return f"{pattern} & /(?s:.{_sized(text.least, text.most)})/" if bounded else pattern


def _all(operator: str, conditions: Sequence[str]) -> str:
    """Conditions joined; llguidance's operators take two."""
    joined = conditions[-1]
    for condition in reversed(conditions[:-1]):
        joined = f"{operator}({condition}, {joined})"
    return joined


# Schemas


@dataclass(frozen=True)
class _Text:
    """One way of being a string: what all hold together.

    Attributes:
        values: the only ones, or None.
        patterns: expressions that the whole text must match.
    """

    values: tuple[str, ...] | None = None
    least: int = 0
    most: int | None = None
    patterns: tuple[_Expression, ...] = ()

    def both(self, other: _Text) -> _Text | None:
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
        return _Text(values, least, most, patterns)


@dataclass(frozen=True)
class _Shape:
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

    properties: dict[str, _Schema] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    undeclared: _Schema | None = None
    listed: bool = False
    dependent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    least: int = 0
    most: int | None = None
    taken: tuple[str, ...] = ()

    def both(self, other: _Shape) -> _Shape:
        """What is both."""
        properties = dict(self.properties)
        for key, schema in other.properties.items():
            properties[key] = _joined(properties[key], schema) if key in properties else schema
        undeclared = self.undeclared if other.undeclared is None else other.undeclared
        if self.undeclared is not None and other.undeclared is not None:
            undeclared = _joined(self.undeclared, other.undeclared)
        return _Shape(
            properties,
            self.required | other.required,
            undeclared,
            self.listed or other.listed,
            {**self.dependent, **other.dependent},
            max(self.least, other.least),
            min((m for m in (self.most, other.most) if m is not None), default=None),
        )


def _loosest(ways: Sequence[_Shape]) -> _Shape:
    """What all of several ways allow, and no more than all of them require."""
    properties: dict[str, list[_Schema]] = {}
    for way in ways:
        for key, schema in way.properties.items():
            known = properties.setdefault(key, [])
            known += [] if any(schema is other for other in known) else [schema]
    undeclared = [way.undeclared for way in ways if way.undeclared is not None]
    return _Shape(
        {key: found[0] if len(found) == 1 else {"anyOf": found} for key, found in properties.items()},
        set.intersection(*(way.required for way in ways)),
        undeclared[0] if len(undeclared) == len(ways) else None,
        all(way.listed for way in ways),
    )


def _joined(one: _Schema, other: _Schema) -> _Schema:
    if one is other or other is True or one is False:
        return one
    return other if one is True or other is False else {"allOf": [one, other]}


_LISTS = ("allOf", "anyOf", "oneOf")
_JOINS = ("$ref", *_LISTS)
_DEFS, _ANY = "#/$defs/", "any"  # the definition of JSON of any kind, all strings in it spared
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# what they say cannot be told by a grammar
_REFUSED = (
    "not", "if", "then", "else", "contains", "uniqueItems", "propertyNames", "dependentSchemas", "dependencies",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
# of a schema that names no type, what it is about
_ABOUT = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": (*_BOUNDS, "multipleOf"),
}
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[0-9A-Za-z]([0-9A-Za-z\\x{2d}]{0,61}[0-9A-Za-z])?"
_DAYS = "0[1-9]|[12][0-9]"
_DAY = f"[0-9]{{4}}-((0[13578]|1[02])-({_DAYS}|3[01])|(0[469]|11)-({_DAYS}|30)|02-({_DAYS}))"
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\x{2e}[0-9]{1,9})?(Z|[+\\x{2d}]([01][0-9]|2[0-3]):[0-5][0-9])"
_WORD = "[0-9A-Fa-f]{1,4}"
_LOCAL = "[0-9A-Za-z_+\\x{2d}]+"
_FORMATS = {  # with the lengths that they have
    "date": (_DAY, 10, 10),
    "time": (_TIME, 9, 24),
    "date-time": (f"{_DAY}T{_TIME}", 20, 35),
    "duration": ("P([0-9]+W|([0-9]+Y)?([0-9]+M)?[0-9]+D(T[0-9]+H)?|T[0-9]+[HMS])", 3, math.inf),
    "uuid": ("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", 36, 36),
    "ipv4": (f"{_BYTE}(\\x{{2e}}{_BYTE}){{3}}", 7, 15),
    "ipv6": (
        "|".join(
            [f"({_WORD}:){{7}}{_WORD}", f"({_WORD}:){{1,7}}:", f":(:{_WORD}){{1,7}}"]
            + [f"({_WORD}:){{1,{7 - n}}}(:{_WORD}){{1,{n}}}" for n in range(1, 7)]
        ),
        3,
        39,
    ),
    "hostname": (f"{_LABEL}(\\x{{2e}}{_LABEL}){{0,7}}", 1, math.inf),
    "email": (f"{_LOCAL}(\\x{{2e}}{_LOCAL})*@{_LABEL}(\\x{{2e}}{_LABEL}){{0,7}}", 3, math.inf),
    "uri": ("[A-Za-z][0-9A-Za-z+\\x{2e}\\x{2d}]*:[0-9A-Za-z!#-&(-\\x{2f}:;=?@_~]+", 3, math.inf),
}


class _Schemas:
    """The schemas of one caller, in the few keywords that are enforced.

    Args:
        root: the caller's schema; references point into it.
        label: what it is of, for errors.
        strict: refuse what cannot be enforced, instead of leaving it out.
        text: an expression for what strings may hold.
    """

    def __init__(self, root: Any, label: str, strict: bool, text: str):
        self.strict = strict
        self._root, self._label, self._spare = root, label, f"^({text})$"
        self._targets: dict[str, _Schema] = {}  # what references point to
        self._waiting: list[str] = []
        self._kinds: dict[int, tuple[_Schema, frozenset[str]]] = {}
        self._texts: dict[str, list[_Text]] = {}
        self._shapes: dict[str, list[_Shape]] = {}
        self._lowered: dict[str, _Schema] = {}
        self.root = self._read(root, 0)
        while self._waiting:
            pointer = self._waiting.pop()
            self._targets[pointer] = self._read(self._pointed(pointer), 0)
        self._numbers = {pointer: i for i, pointer in enumerate(self._targets)}
        self._target_kinds = dict.fromkeys(self._targets, frozenset[str]())
        self._settle()

    def refuse(self, problem: str) -> None:
        """What is left out, or an error if the caller is strict."""
        if self.strict:
            raise InputError(f"{self._label}: {problem}: change it or set strict to false")

    # reading: of each keyword what is sound

    def _read(self, schema: Any, depth: int) -> _Schema:
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
        if "type" not in read and "enum" not in read and not any(key in read for key in _JOINS):
            about = [kind for kind, keywords in _ABOUT.items() if any(key in read for key in keywords)]
            if about:
                read["type"] = about
        return read or True

    def _read_values(self, schema: Mapping[str, Any], read: dict[str, Any]) -> None:
        """type, enum and const."""
        types = schema.get("type")
        listed = [types] if isinstance(types, str) else types
        if listed is not None:
            known = [t for t in listed if isinstance(t, str) and t in _KINDS] if isinstance(listed, list) else []
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
            fit = [value for value in values if _kind(value) <= self._own(read)]
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
            expression = _expression(pattern)
            own = _Text(None, read.get("minLength", 0), read.get("maxLength"))
            if expression is None or own.both(_Text(patterns=(expression,))) is None:
                self.refuse(f"pattern {str(pattern)[:60]!r} cannot be enforced")
            else:
                read["pattern"] = expression
        form = schema.get("format")
        if form is not None and self.strict:  # without strict it is a remark, as JSON Schema has it
            if isinstance(form, str) and form in _FORMATS and "pattern" not in read:
                read["format"] = form
            elif "string" in self._own(read):
                self.refuse(f"format {str(form)[:60]!r} cannot be enforced")

    def _read_bounds(self, schema: Mapping[str, Any], read: dict[str, Any]) -> None:
        """How large numbers are, and of what they are multiples."""
        bounds = {key: schema[key] for key in _BOUNDS if schema.get(key) is not None}
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
        self._exclude(read, [(small, large) for small in _BOUNDS[::2] for large in _BOUNDS[1::2]])
        low = max((read[key] for key in _BOUNDS[::2] if key in read), default=-math.inf)
        high = min((read[key] for key in _BOUNDS[1::2] if key in read), default=math.inf)
        whole = self._own(read) & _KINDS["number"] == _KINDS["integer"]
        first = low + 1 if low == read.get("exclusiveMinimum") and low == math.floor(low) else low
        last = high - 1 if high == read.get("exclusiveMaximum") and high == math.floor(high) else high
        if whole and last - first < 1 and math.ceil(first) > math.floor(last):
            self.refuse("no integer is between minimum and maximum")
            low, high = -math.inf, math.inf
            for keyword in _BOUNDS:
                read.pop(keyword, None)
        step = schema.get("multipleOf")
        if step is not None:
            digits = _digits(step) if _is_number(step) else 0
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
            if any(key in schema for key in (*_JOINS, "if")):
                self.refuse("unevaluatedProperties of a combination cannot be enforced")
                others = None
        elif schema.get("unevaluatedProperties") is not None:
            self.refuse("unevaluatedProperties cannot be enforced")
        if others is not None:
            read["additionalProperties"] = self._read(others, depth)
        patterns = schema.get("patternProperties")
        if isinstance(patterns, Mapping):
            known = {found: value for key, value in patterns.items() if (found := _expression(key)) is not None}
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
        for keyword in _LISTS:
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
                if target not in self._targets:
                    self._targets[target] = True
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

    # which kinds of values a schema has

    def _settle(self) -> None:
        """Kinds of what references point to: the least that agree, as they may point in circles."""
        users: dict[str, list[str]] = {pointer: [] for pointer in self._targets}
        for pointer, target in self._targets.items():
            for other in set(_references(target)):
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

    @staticmethod
    def _own(schema: Mapping[str, Any]) -> frozenset[str]:
        """The kinds that a schema itself names."""
        types = schema.get("type")
        return _ALL if types is None else frozenset().union(*(_KINDS[name] for name in types))

    def kinds(self, schema: _Schema) -> frozenset[str]:
        """The kinds of values that may match, at most."""
        if isinstance(schema, bool):
            return _ALL if schema else frozenset()
        known = self._kinds.get(id(schema))
        if known is not None:
            return known[1]
        kinds = self._own(schema)
        if "enum" in schema:
            kinds &= frozenset().union(*(_kind(value) for value in schema["enum"]))
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

    def values(self, schema: _Schema) -> tuple[list[_Text], _Schema | None]:
        """The ways in which a value may be a string, and a schema of those that are none, or None without any."""
        texts, other = self._texts_of(schema), self._without_text(schema)
        if not texts and other is None:
            self.refuse("a schema excludes every value")
            return self.values(True)
        return texts, other

    def _texts_of(self, schema: _Schema) -> list[_Text]:
        if isinstance(schema, bool):
            return [_Text()] if schema else []
        if "string" not in self.kinds(schema):
            return []
        patterns = [schema["pattern"]] if "pattern" in schema else []
        if "format" in schema:
            patterns.append(_Expression(*_FORMATS[schema["format"]]))
        values = None
        if "enum" in schema:
            values = tuple(dict.fromkeys(v for v in schema["enum"] if isinstance(v, str) and _sane(v)))
        own = _Text(None, schema.get("minLength", 0), schema.get("maxLength"), tuple(patterns))
        ways = _crossed([own], [_Text(values)])
        if "$ref" in schema:
            pointer = schema["$ref"]
            if pointer not in self._texts:
                self._texts[pointer] = []  # a circle adds nothing
                self._texts[pointer] = self._texts_of(self._targets[pointer])
            ways = _crossed(ways, self._texts[pointer])
        for part in schema.get("allOf", ()):
            ways = self._few(_crossed(ways, self._texts_of(part)))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                parts = [self._texts_of(part) for part in schema[keyword]]
                if keyword == "oneOf" and not _apart(parts):
                    self.refuse("oneOf of strings cannot be enforced")
                ways = self._few(_crossed(ways, self._few(_merged([way for part in parts for way in part]))))
        return [self._told(way) for way in ways]

    def _told(self, way: _Text) -> _Text:
        """A way whose parts together match something for certain, or an answer could not go on."""
        if not way.patterns:
            return way
        if way.values or len(way.patterns) > 1:
            self.refuse("a pattern beside another, a format or an enum cannot be enforced")
        if way.values:
            return replace(way, patterns=())
        least, most = self._beside(way.patterns[0], way.least, way.most)
        return _Text(None, least, most, way.patterns[:1])

    def _beside(self, pattern: _Expression, least: int, most: int | None) -> tuple[int, int | None]:
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

    def _without_text(self, schema: _Schema) -> _Schema | None:
        kinds = self.kinds(schema) - {"string"}
        if not kinds:
            return None
        if isinstance(schema, bool):
            return {"type": _types(kinds)}
        if "string" not in self.kinds(schema):
            return schema
        for keyword in ("anyOf", "oneOf"):
            if list(schema) == [keyword]:
                left = [other for part in schema[keyword] if (other := self._without_text(part)) is not None]
                return left[0] if len(left) == 1 else {keyword: left}
        if any(key in schema for key in _JOINS):
            return {"type": _types(kinds), "allOf": [schema]}
        rest = {key: value for key, value in schema.items() if key not in (*_ABOUT["string"], "enum")}
        if "enum" in schema:
            rest["enum"] = [value for value in schema["enum"] if not isinstance(value, str)]
        return {**rest, "type": _types(kinds)}

    # arguments

    def shapes(self) -> list[_Shape]:
        """The ways in which the root describes the arguments of a call."""
        if self.root is not False and "object" not in self.kinds(self.root):
            self.refuse("no arguments fit its parameters")
        ways = self._shapes_of(self.root)
        if len(ways) > 1 and sum(len(way.properties) for way in ways) > MOST_SPREAD:
            self.refuse("so many alternatives of so many parameters cannot be enforced")
            ways = [_loosest(ways)]
        return [self._finished(way) for way in ways]

    def _shapes_of(self, schema: _Schema) -> list[_Shape]:
        if isinstance(schema, bool):
            return [_Shape()] if schema else []
        for keyword in ("enum", "patternProperties"):
            if keyword in schema:
                self.refuse(f"{keyword} of parameters cannot be enforced")
        ways = [
            _Shape(
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

    def _finished(self, shape: _Shape) -> _Shape:
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
            elif not _writable(key):
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
            taken=tuple(key for key in shape.properties if _writable(key)),
        )

    # lowering: what llguidance gets to see

    def document(self, schema: _Schema) -> dict[str, Any]:
        """A schema of JSON text with all that it refers to."""
        lowered = self._lower(schema)
        whole: dict[str, Any] = dict(lowered) if isinstance(lowered, dict) else {"allOf": [lowered]}
        needed: dict[str, _Schema] = {}
        waiting, levels = [lowered], 0
        while waiting:
            part = waiting.pop()
            levels += _levels(part)
            if levels > MOST_LEVELS:
                self.refuse("schemas refer to too many others")
                return self.document(self.any_like(schema))
            for name in (target.removeprefix(_DEFS) for target in _references(part)):
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

    def any_like(self, schema: _Schema) -> _Schema:
        """A small schema of the same kinds of values."""
        return {"type": _types(self.kinds(schema))}

    def _definition(self, name: str) -> _Schema:
        """A lowered schema that others refer to."""
        if name not in self._lowered:
            if name == _ANY:
                self._lowered[name] = self._lower_alone({"type": _types(_ALL)}, False)
            else:
                number, _, joined = name.partition("-")
                self._lowered[name] = self._lower(list(self._targets.values())[int(number)], bool(joined))
        return self._lowered[name]

    def _lower(self, schema: _Schema, joined: bool = False) -> _Schema:
        """A schema for llguidance, whose strings are spared.

        Where schemas are joined, llguidance intersects them. It would not come to an end with two that hold
        each any JSON, so there what is open stays open, not spared.
        """
        if isinstance(schema, bool):
            return schema if joined or not schema else {"$ref": _DEFS + _ANY}
        if not self.kinds(schema):
            self.refuse("a schema excludes every value")
            return self._lower(True, joined)
        joins = [key for key in _JOINS if key in schema]
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
            lowered = self._lower_alone({"type": _types(_ALL), **own}, joined)
        for keyword in _LISTS:
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
        lowered: dict[str, Any] = {"type": _types(kinds)}
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
            lowered |= {key: schema[key] for key in _BOUNDS if key in schema}
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
            least, most = self._beside(_Expression(*_FORMATS[schema["format"]]), least, most)
        elif "pattern" in schema:
            lowered["pattern"] = f"^({schema['pattern'].text})$"
            least, most = self._beside(schema["pattern"], least, most)
        elif least > MOST_LEAST:
            lowered["pattern"] = f"^{_FREE}{_sized(least, most)}$"
            least, most = 0, None
        else:
            lowered["pattern"] = self._spare
        if least:
            lowered["minLength"] = least
        if most is not None:
            lowered["maxLength"] = most

    def _lower_object(self, schema: dict[str, Any], lowered: dict[str, Any], joined: bool) -> None:
        properties, required = dict(schema.get("properties", {})), list(schema.get("required", []))
        for key in [key for key in (*properties, *required) if not _sane(key)]:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _digits(step: float) -> int:
    """A number without its decimal point as llguidance finds it; 0 for one that is too small or not exact."""
    for _ in range(12):
        if step == math.floor(step) or step > MOST_STEP:
            return int(min(step, MOST_STEP + 1))
        step *= 10
    return 0


def _types(kinds: Iterable[str]) -> list[str]:
    """Kinds as a list of types."""
    return [kind for kind in _KINDS if kind in kinds and not (kind == "integer" and "number" in kinds)]


def _kind(value: Any) -> frozenset[str]:
    """The kind of a value."""
    if value is None:
        return _KINDS["null"]
    if isinstance(value, bool):
        return _KINDS["boolean"]
    if isinstance(value, int | float):
        return frozenset({"integer" if value == int(value) else "number"})
    return _KINDS["string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"]


def _plain(value: Any) -> bool:
    """Whether JSON can hold a value, and a call; llguidance reads 128 levels."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return _sane(text) and len(text) <= MOST_VALUE and text.count("[") + text.count("{") <= MOST_DEPTH


def _references(schema: Any) -> list[str]:
    """What a schema refers to."""
    if isinstance(schema, list):
        return [target for part in schema for target in _references(part)]
    if not isinstance(schema, dict):
        return []
    parts = [part for key, part in schema.items() if key != "enum" or isinstance(part, dict)]  # values hold none
    found = [target for part in parts for target in _references(part)]
    return [*found, schema["$ref"]] if isinstance(schema.get("$ref"), str) else found


def _levels(schema: Any) -> int:
    """How deep lists and objects are nested."""
    if isinstance(schema, dict | list):
        return 1 + max(map(_levels, schema.values() if isinstance(schema, dict) else schema), default=0)
    return 0


def _apart(parts: Sequence[Sequence[_Text]]) -> bool:
    """Whether no string is in two of the parts, for all that can be told."""
    several = [part for part in parts if part]
    values = [value for part in several for value in {v for way in part for v in way.values or ()}]
    listed = all(way.values is not None for part in several for way in part)
    return len(several) < 2 or (listed and len(set(values)) == len(values))


def _crossed(ones: Sequence[_Text], others: Sequence[_Text]) -> list[_Text]:
    """What is both one of these and one of those."""
    return _merged([both for one in ones for other in others if (both := one.both(other)) is not None])


def _merged(ways: Sequence[_Text]) -> list[_Text]:
    """The same ways, all lists of values in one."""
    listed = dict.fromkeys(value for way in ways if way.values and not way.patterns for value in way.values)
    rest = list(dict.fromkeys(way for way in ways if not way.values or way.patterns))
    return [*rest, _Text(tuple(listed))] if listed else rest


# Regular expressions


@dataclass(frozen=True)
class _Expression:
    """A regular expression of llguidance's for whole texts, and how long these are."""

    text: str
    least: int = 0
    most: float = math.inf

    def then(self, other: _Expression) -> _Expression:
        """One text behind another."""
        return _Expression(self.text + other.text, self.least + other.least, self.most + other.most)

    def times(self, least: int, most: float, sign: str) -> _Expression:
        """Several texts."""
        longest = 0 if 0 in (self.most, most) else self.most * most
        return _Expression(f"({self.text}{sign})", self.least * least, longest)


def _either(ways: Sequence[_Expression]) -> _Expression:
    text = "|".join(way.text for way in ways)
    return _Expression(f"({text})", min(way.least for way in ways), max(way.most for way in ways))


def _expression(pattern: Any) -> _Expression | None:
    """An expression for each text in which a schema's pattern is found; None if there is none.

    The pattern is ECMA-262's. Lookarounds, back references, word boundaries and anchors within a pattern have no
    counterpart. None of the texts has a bar, so that it needs no other expression beside it to be spared.
    """
    if not isinstance(pattern, str):
        return None
    reader = _Pattern(pattern)
    try:
        found = reader.whole()
    except _UnknownError:
        return None
    return found if reader.at == len(pattern) else None


class _UnknownError(Exception):
    """A pattern that has no counterpart."""


_CLASSES = {
    "d": "0-9",
    "D": "\\x{0}-\\x{2f}\\x{3a}-\\x{ff5b}\\x{ff5d}-\\x{10ffff}",
    "w": "0-9A-Za-z_",
    "W": "\\x{0}-\\x{2f}\\x{3a}-\\x{40}\\x{5b}-\\x{5e}\\x{60}\\x{7b}-\\x{ff5b}\\x{ff5d}-\\x{10ffff}",
    "s": "\\x{9}-\\x{d}\\x{20}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"
    "\\x{3000}\\x{feff}",
    "S": "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}"
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{fefe}\\x{ff00}-\\x{ff5b}\\x{ff5d}-\\x{10ffff}",
}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_COUNTS: dict[str, tuple[int, float]] = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}
_ANYTHING = _Expression(f"{_FREE}*")
_NOTHING = _Expression("", 0, 0)
_HEX = frozenset("0123456789abcdefABCDEF")


def _range(low: str, high: str) -> str:
    """The characters of a class from one to another, but the bar."""
    if low <= _BAR <= high:
        parts = [(low, chr(ord(_BAR) - 1)), (chr(ord(_BAR) + 1), high)]
        return "".join(_range(first, last) for first, last in parts if first <= last)
    return f"{_hex(low)}-{_hex(high)}"


class _Pattern:
    """Reads a pattern from `at` on."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def _next(self, *expected: str) -> bool:
        """Step over one of these, if one comes."""
        for word in expected:
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return True
        return False

    def _take(self) -> str:
        if self.at >= len(self.text):
            raise _UnknownError
        self.at += 1
        return self.text[self.at - 1]

    def whole(self) -> _Expression:
        """The alternatives, each found anywhere unless anchored."""
        ways = []
        while True:
            begin = _NOTHING if self._next("^") else _ANYTHING
            body = self._sequence()
            ways.append(begin.then(body).then(_NOTHING if self._next("$") else _ANYTHING))
            if not self._next("|"):
                return _either(ways)

    def _sequence(self) -> _Expression:
        found = _NOTHING
        while self.at < len(self.text) and self.text[self.at] not in "|)$":
            found = found.then(self._quantified())
        return found

    def _quantified(self) -> _Expression:
        atom = self._atom()
        if self._next("*", "+", "?"):
            sign = self.text[self.at - 1]
            atom = atom.times(*_COUNTS[sign], sign)
        elif self._next("{"):
            count, closed, _ = self.text[self.at :].partition("}")
            least, comma, most = count.partition(",")
            numbers = [number for number in (least, most) if number]
            if not closed or not least or not all(n.isascii() and n.isdecimal() and len(n) < 9 for n in numbers):
                raise _UnknownError
            if any(int(number) > MOST_REPEATS for number in numbers) or (most and int(most) < int(least)):
                raise _UnknownError
            top = int(most) if most else math.inf if comma else int(least)
            atom = atom.times(int(least), top, f"{{{count}}}")
            self.at += len(count) + 1
        else:
            return atom
        self._next("?")  # how much it prefers to match does not matter
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise _UnknownError
        return atom

    def _atom(self) -> _Expression:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return _Expression(self._class(), 1, 1)
        if char == ".":
            return _Expression("[^\\x{a}\\x{d}\\x{2028}\\x{2029}\\x{ff5c}]", 1, 1)
        if char in "^*+?{":
            raise _UnknownError
        member = self._member(char)
        if member == _BAR:
            raise _UnknownError
        return _Expression(f"[{member}]" if len(member) > 1 else _hex(member), 1, 1)

    def _group(self) -> _Expression:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise _UnknownError
        if self._next("?") and not self._next(":"):
            if not self._next("<", "P<") or self._next("=", "!"):
                raise _UnknownError
            while self._take() != ">":
                pass
        ways = [self._sequence()]
        while self._next("|"):
            ways.append(self._sequence())
        if not self._next(")"):
            raise _UnknownError
        self.depth -= 1
        return _either(ways)

    def _class(self) -> str:
        parts: list[str] = []
        negated = self._next("^")
        if self._next("]"):
            if negated:
                return _FREE
            raise _UnknownError
        while not self._next("]"):
            low = self._member(self._take(), inside=True)
            if len(low) > 1:  # a class of its own
                parts.append(low)
            elif self.text[self.at : self.at + 1] == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self._member(self._take(), inside=True)
                if len(high) > 1 or high < low:
                    raise _UnknownError
                parts.append(_range(low, high))
            else:
                parts.append(_range(low, low))
        if negated:
            return f"[^{''.join(parts)}{_hex(_BAR)}]"
        if not any(parts):
            raise _UnknownError
        return f"[{''.join(parts)}]"

    def _member(self, char: str, inside: bool = False) -> str:
        """A character, or the ranges of a class that has a name."""
        if char == "\\":
            char = self._take()
            if char in _CLASSES:
                return _CLASSES[char]
            if char in "xu":
                char = self._code(char)
            elif char in _CONTROLS:
                char = _CONTROLS[char]
            elif char == "b" and inside:
                char = "\b"
            elif char.isalnum():  # back references, boundaries, properties
                raise _UnknownError
        if 0xD800 <= ord(char) < 0xE000:
            raise _UnknownError
        return char

    def _code(self, kind: str) -> str:
        """A character by its number; above U+FFFF ECMA-262 writes two halves."""
        if kind == "u" and self._next("{"):
            digits, closed, _ = self.text[self.at :].partition("}")
            self.at += len(digits) + 1
            if not closed or not 0 < len(digits) < 7 or not _HEX.issuperset(digits) or int(digits, 16) > 0x10FFFF:
                raise _UnknownError
            return chr(int(digits, 16))
        code = self._digits(2 if kind == "x" else 4)
        if 0xD800 <= code < 0xDC00 and self._next("\\u"):
            low = self._digits(4)
            if not 0xDC00 <= low < 0xE000:
                raise _UnknownError
            code = 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00
        return chr(code)

    def _digits(self, count: int) -> int:
        digits = self.text[self.at : self.at + count]
        if len(digits) < count or not _HEX.issuperset(digits):
            raise _UnknownError
        self.at += count
        return int(digits, 16)
