"""The grammar of an answer: calls in the form of encoding.md 3, typed by their tools, or JSON of a schema.

It is text in llguidance's dialect of Lark. Parameters come in any order, each at most once, the required ones
always: a rule carries the set of those that are there as bits (llguidance's parametric rules). A value may be a
string, which DSML writes raw, or anything else, which it writes as JSON; a schema that allows both gives both
spellings. All that a model may write freely is spared: it cannot spell a mark with ordinary tokens, at which the
parser would end the value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from abyssal.base.errors import InputError
from abyssal.chat.api import Constraint, ToolMode
from abyssal.chat.constrain.kinds import Schema
from abyssal.chat.constrain.schemas import MOST_LEAST, Schemas
from abyssal.chat.constrain.spelling import CALL_TEXT, CONTENT_TEXT, FREE, literal, sized, writable
from abyssal.chat.constrain.ways import Shape, Text
from abyssal.encoding.dsml import BEFORE_CALLS
from abyssal.encoding.literals import DSML, THINK_END
from abyssal.encoding.tokenizer import Piece

MOST_TOOLS = 1_000  # llguidance keeps 2,000 possibilities in sight
MOST_UNDECLARED = 4  # parameters that no schema declares, of one call
MOST_BITS = 56  # parameters whose set fits into a rule's 64 bits, beside the counter of undeclared ones
MOST_JSON = 400_000  # characters of schemas, beyond which parameters of lenient tools may be any JSON
REMEMBERED = 64  # constraints
_NONE = {"type": "object", "properties": {}, "additionalProperties": False}
_ENTRY = "\0"  # in grammar text: the DSML token
_RAW, _AS_JSON = '"true">', '"false">'  # how the opening tag of a parameter ends
_UNDECLARED = "[60:63]"  # bits that count parameters that no schema declares
_BLOCK = f"{literal(f'{BEFORE_CALLS}<')} {_ENTRY} calls"


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
        return _remembered(json.dumps([list(tools), mode, name, parallel, schema, schema_strict, thinking]))
    except RecursionError:
        raise InputError("schemas of this request refer to each other too deeply: make them flatter") from None


@lru_cache(maxsize=REMEMBERED)
def _remembered(asked: str) -> Constraint | None:
    """The constraint of arguments as JSON: each turn of an agent brings the same tools, perhaps hundreds."""
    tools, mode, name, parallel, schema, schema_strict, thinking = json.loads(asked)
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
        schemas = Schemas(schema, "the response schema", strict, CONTENT_TEXT)
        self._left = MOST_JSON
        return self._json(schemas, schemas.root)

    def _named(self, kind: str, body: str) -> str:
        """The name of a rule or terminal with this body; the same bodies share one."""
        return self._names.setdefault(body, f"{kind}{len(self._names)}")

    def _json(self, schemas: Schemas, schema: Schema) -> str:
        text = json.dumps(schemas.document(schema), allow_nan=False)
        if f"%json {text}" not in self._names:
            if len(text) > self._left and not schemas.strict:
                text = json.dumps(schemas.document(schemas.any_like(schema)))
            self._left -= len(text)
        return self._named("j", f"%json {text}")

    def _tool(self, name: str, tool: Mapping[str, Any]) -> str:
        if not writable(name):
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
        schemas = Schemas(parameters, f"tool {name!r}", strict, CALL_TEXT)
        shapes = schemas.shapes()
        if not shapes:
            raise InputError(f"no arguments fit the parameters of tool {name!r}: give a schema of an object")
        heads = literal(f'invoke name="{name}">\n')
        bodies = [self._shape(schemas, shape) for shape in shapes]
        return f"{heads} ({' | '.join(dict.fromkeys(bodies))})"

    def _shape(self, schemas: Schemas, shape: Shape) -> str:
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

    def _value(self, schemas: Schemas, key: str, schema: Schema) -> str:
        """A declared parameter with its value."""
        head = f'parameter name="{key}" string='
        return self._named("v", " | ".join(self._spellings(schemas, schema, lambda kind: literal(head + kind))))

    def _undeclared(self, schemas: Schemas, schema: Schema, others: Sequence[str]) -> str:
        """A parameter that no schema declares; its whole tag is one terminal, as lexing does not go back."""
        taken = f" & ~({' | '.join(map(literal, others))})" if others else ""
        name = f'"parameter name=\\"" (/[^\\x{{22}}\\x{{3c}}\\x{{3e}}\\x{{a}}\\x{{ff5c}}]{{1,64}}/{taken}) '
        tags = {kind: self._named("N", name + literal(f'" string={kind}')) for kind in (_RAW, _AS_JSON)}
        return self._named("v", " | ".join(self._spellings(schemas, schema, tags.__getitem__)))

    def _spellings(self, schemas: Schemas, schema: Schema, tag: Callable[[str], str]) -> list[str]:
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
    def _text(text: Text) -> str:
        if text.values is not None:
            return " | ".join(map(literal, text.values))
        if not text.patterns and text.least > MOST_LEAST:
            return f"/{FREE}{sized(text.least, text.most)}/"
        pattern = f"/{text.patterns[0].text if text.patterns else CALL_TEXT}/"
        bounded = text.least or text.most is not None
        return f"{pattern} & /(?s:.{sized(text.least, text.most)})/" if bounded else pattern


def _all(operator: str, conditions: Sequence[str]) -> str:
    """Conditions joined; llguidance's operators take two."""
    joined = conditions[-1]
    for condition in reversed(conditions[:-1]):
        joined = f"{operator}({condition}, {joined})"
    return joined
