"""What binds an answer: what the grammar lets through, the parser reads without repairs, and the tools' schemas hold.

llguidance itself is asked, over the bundled tokenizer. A walker takes random tokens of those that may come.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from abyssal.base.errors import InputError
from abyssal.chat.api import Constraint
from abyssal.chat.constrain.calls import constraint_of, lark_text
from abyssal.cli.models import bundled_folder
from abyssal.encoding.dsml import calls
from abyssal.encoding.literals import DSML, EOS, SPECIAL_TOKENS, THINK_END
from abyssal.encoding.messages import ToolCall
from abyssal.encoding.parse import Parsed, parse
from abyssal.encoding.tokenizer import Piece, Tokenizer
from abyssal.engine.grammar import Grammar, GrammarCompiler, Matcher

END = 1
MARKS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_folder())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(bundled_folder() / "tokenizer.json", tokenizer.vocab_size, tokenizer.special(EOS))


class Bench:
    """Constraints on the bundled vocabulary."""

    def __init__(self, tokenizer: Tokenizer, compiler: GrammarCompiler):
        self.tokenizer, self.compiler = tokenizer, compiler
        self.mark = tokenizer.special(DSML)
        self.tokens = {text: tokenizer.encode(text)[0] for text in ("<", "/", '"', "]", "}")}

    def start(self, constraint: Constraint) -> Matcher:
        return self.compiler.start(Grammar("lark", lark_text(constraint.grammar, self.tokenizer.special)))

    def ids(self, text: str) -> list[int]:
        """Tokens of a text that the model would write: marks are special."""
        ids: list[int] = []
        at = 0
        for mark in MARKS.finditer(text):
            ids += [*self.tokenizer.encode(text[at : mark.start()]), self.tokenizer.special(mark.group())]
            at = mark.end()
        return ids + self.tokenizer.encode(text[at:])

    def rejected(self, constraint: Constraint, text: str | Sequence[int]) -> str | None:
        """What is left of a text where the grammar does not let it go on; None if it is whole and complete."""
        matcher = self.start(constraint)
        ids = self.ids(text) if isinstance(text, str) else list(text)
        for i, token in enumerate([*ids, END]):
            if not matcher.allowed()[token]:
                return self.tokenizer.decode(ids[i:], keep_special=True) + EOS
            matcher.accept(token)
        return None

    def accepts(self, constraint: Constraint, text: str | Sequence[int]) -> bool:
        return self.rejected(constraint, text) is None

    def walk(self, constraint: Constraint, rng: random.Random, most: int = 3000) -> str:
        """A random text of the grammar, in ever more of a hurry."""
        matcher = self.start(constraint)
        ids: list[int] = []
        stretch = 0  # tokens since the last hurried one
        while not matcher.complete:
            allowed = matcher.allowed()
            choices = np.flatnonzero(allowed)
            assert len(choices), f"nothing may follow {self.tokenizer.decode(ids[-40:], keep_special=True)!r}"
            stretch += 1
            if rng.random() < min(0.9, 0.1 + stretch / 30 + 2 * len(ids) / most):
                choices, stretch = self.hurried(allowed, ids[-2:]), 0
            ids.append(int(rng.choice(choices)))
            matcher.accept(ids[-1])
            assert len(ids) < most, f"no end: {self.tokenizer.decode(ids[-60:], keep_special=True)!r}"
        if ids[-1] == END:
            ids.pop()
        return self.tokenizer.decode(ids, keep_special=True)

    def hurried(self, allowed: NDArray[np.bool_], last: list[int]) -> Any:
        """Of the tokens that may come, those that bring it to an end."""
        open_, slash = self.tokens["<"], self.tokens["/"]
        if allowed[END]:
            return [END]
        if allowed[slash] and last[-1:] == [open_]:
            return [slash]
        if allowed[self.mark]:
            return [self.mark]
        return [token for token in self.tokens.values() if allowed[token]] or np.flatnonzero(allowed)


@pytest.fixture(scope="module")
def bench(tokenizer: Tokenizer, compiler: GrammarCompiler) -> Bench:
    return Bench(tokenizer, compiler)


def bound(tools: Sequence[Mapping[str, Any]] = (), **more: Any) -> Constraint:
    constraint = bound_or_none(tools, **more)
    assert constraint is not None
    return constraint


def bound_or_none(tools: Sequence[Mapping[str, Any]] = (), **more: Any) -> Constraint | None:
    given: dict[str, Any] = {
        "mode": "auto", "name": None, "parallel": True, "schema": None, "schema_strict": False, "thinking": False,
    }  # fmt: skip
    return constraint_of(tools=tools, **(given | more))


def tool(name: str = "f", strict: bool = False, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "strict": strict, "parameters": {"type": "object", **parameters}}


def one(schema: Any, **more: Any) -> list[dict[str, Any]]:
    """A tool with one parameter, which it needs."""
    return [tool(properties={"p": schema}, required=["p"], **more)]


def block(*made: tuple[str, Mapping[str, Any]]) -> str:
    """Calls as the encoder writes them, from behind the first DSML token on."""
    texts = calls([ToolCall(name, json.dumps(arguments)) for name, arguments in made])
    text = "".join(text for text, _ in texts)
    return text.removeprefix(f"\n\n<{DSML}")


def read(text: str, tools: Sequence[Mapping[str, Any]]) -> Parsed:
    """What the parser makes of a block; every call must be one of the tools, and its arguments must be valid."""
    parsed = parse(f"\n\n<{DSML}{text}{EOS}", thinking=False, tools=tools)
    assert not parsed.repairs, (parsed.repairs, text)
    assert parsed.complete and parsed.content == "" and parsed.tool_calls
    schemas = {tool["name"]: tool.get("parameters") or {"type": "object"} for tool in tools}
    for call in parsed.tool_calls:
        arguments = json.loads(call.arguments, object_pairs_hook=unique, parse_constant=pytest.fail)
        jsonschema.validate(arguments, schemas[call.name])
    return parsed


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; no name may come twice but where a schema leaves names open."""
    return dict(pairs)


# Random tools and arguments for them


class Maker:
    """Random schemas, and values for them."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def word(self) -> str:
        return self.rng.choice(["a", "path", "größe", "名前", "x-y", "a b", "Z9", "données", "🐟"]) + str(
            self.rng.randrange(100)
        )

    def schema(self, depth: int = 0) -> Any:
        rng = self.rng
        simple = ["string", "sized", "integer", "number", "boolean", "null", "enum", "mixed", "any", "types", "pattern"]
        kind = rng.choice(
            simple if depth > 2 else [*simple, "array", "object", "object", "union", "ref", "tuple", "map"]
        )
        if kind == "string":
            return {"type": "string", "description": "any text"}
        if kind == "sized":
            least = rng.randrange(3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(12)}
        if kind == "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", r"^\d+(\.\d+)?$", "^(on|off)$", "x|y$"])}
        if kind == "integer":
            return {"type": "integer", **rng.choice([{}, {"minimum": -3}, {"minimum": 1, "maximum": 1000}])}
        if kind == "number":
            return {"type": "number", **rng.choice([{}, {"exclusiveMinimum": 0}, {"minimum": -1.5, "maximum": 20}])}
        if kind in ("boolean", "null"):
            return {"type": kind}
        if kind == "enum":
            return {"type": "string", "enum": [self.word() for _ in range(rng.randrange(1, 5))]}
        if kind == "mixed":
            return {"enum": rng.sample(["a", "", 1, None, True, 2.5, "</", [1, "b"], {"k": "v"}], rng.randrange(1, 5))}
        if kind == "any":
            return rng.choice([True, {}, {"description": "what you like"}])
        if kind == "types":
            return {"type": rng.sample(["string", "integer", "null", "boolean"], 2)}
        if kind == "array":
            more = rng.choice([{}, {"minItems": 1}, {"maxItems": 3}])
            return {"type": "array", "items": self.schema(depth + 1), **more}
        if kind == "tuple":
            return {"type": "array", "prefixItems": [self.schema(depth + 1)], "items": False}
        if kind == "map":
            return {"type": "object", "additionalProperties": self.schema(depth + 1)}
        if kind == "union":
            return {
                rng.choice(["anyOf", "oneOf"]): [
                    {"type": "null"},
                    rng.choice([{"type": "string"}, {"type": "integer"}]),
                ]
            }
        if kind == "ref":
            return {"$ref": rng.choice(["#/$defs/Tree", "#/$defs/Name", "#/$defs/Either"])}
        return self.object(depth + 1, 3)

    def object(self, depth: int, most: int) -> dict[str, Any]:
        names = list(dict.fromkeys(self.word() for _ in range(self.rng.randrange(most + 1))))
        made: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        required = [name for name in names if self.rng.random() < 0.5]
        if required or self.rng.random() < 0.5:
            made["required"] = required
        if self.rng.random() < 0.5:
            made["additionalProperties"] = False
        return made

    def tools(self, count: int, most: int) -> list[dict[str, Any]]:
        return [self.tool(f"tool_{i}", most) for i in range(count)]

    def tool(self, name: str, most: int) -> dict[str, Any]:
        parameters = self.object(0, most)
        parameters["$defs"] = {
            "Tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "label": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                },
                "required": ["value"],
            },
            "Name": {"type": "string", "maxLength": 20},
            "Either": {"anyOf": [{"$ref": "#/$defs/Name"}, {"$ref": "#/$defs/Tree"}, {"type": "number"}]},
        }
        return {"name": name, "description": "does it", "parameters": parameters}

    def value(self, schema: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
        """A valid value, objects in the order of their schema."""
        rng = self.rng
        if schema is True or not schema or set(schema) == {"description"}:
            return rng.choice([None, 1, "text", [1, {"a": "b"}], {"k": [], "l": 1.5}, True, -2.25])
        if "$ref" in schema:
            return self.value(root["$defs"][schema["$ref"].split("/")[-1]], root, depth + 1)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self.value(rng.choice(schema[keyword]), root, depth)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        kind = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
        if kind == "string":
            return self.text(schema)
        if kind in ("integer", "number"):
            low, high = (
                math.ceil(schema.get("minimum", schema.get("exclusiveMinimum", -9) + 1)),
                schema.get("maximum", 99),
            )
            return rng.randint(low, int(high)) if kind == "integer" or rng.random() < 0.5 else low + 0.25
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "null":
            return None
        if kind == "array":
            if "prefixItems" in schema:
                return [self.value(schema["prefixItems"][0], root, depth + 1)]
            count = rng.randint(schema.get("minItems", 0), min(schema.get("maxItems", 3), 2 if depth < 4 else 1))
            return [
                self.value(schema["items"], root, depth + 1)
                for _ in range(count if depth < 6 else schema.get("minItems", 0))
            ]
        if "properties" not in schema:
            return {
                self.word(): self.value(schema["additionalProperties"], root, depth + 1)
                for _ in range(rng.randrange(3))
            }
        return self.arguments(schema, root, depth)

    def text(self, schema: Mapping[str, Any]) -> str:
        if "pattern" in schema:
            for text in ("ab", "on", "12.5", "7", "axb", "y"):
                if re.search(schema["pattern"], text) and self.rng.random() < 0.9:
                    return text
            return next(text for text in ("ab", "12", "on", "x") if re.search(schema["pattern"], text))
        pool = 'ab <>/"\\\n｜é魚🐟{}[]:,&</'
        least = schema.get("minLength", 0)
        most = schema.get("maxLength", 25)
        return "".join(self.rng.choice(pool) for _ in range(self.rng.randint(least, most)))

    def arguments(self, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
        required = schema.get("required", [])
        return {
            key: self.value(value, root, depth + 1)
            for key, value in schema["properties"].items()
            if key in required or (depth < 6 and self.rng.random() < 0.5)
        }


@pytest.mark.parametrize("seed", range(40))
def test_what_the_grammar_lets_through_is_parsed_whole_and_valid(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    tools = Maker(rng).tools(rng.randrange(1, 5), rng.choice([2, 6, 12]))
    constraint = bound(tools, parallel=bool(seed % 3))
    for _ in range(4):
        parsed = read(bench.walk(constraint, rng), tools)
        assert seed % 3 or len(parsed.tool_calls) == 1


@pytest.mark.parametrize("seed", range(40))
def test_what_the_encoder_writes_is_let_through_in_every_order(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    maker = Maker(rng)
    tools = maker.tools(rng.randrange(1, 4), rng.choice([2, 6, 12]))
    constraint = bound(tools)
    for _ in range(6):
        made = []
        for _ in range(rng.randrange(1, 4)):
            chosen = rng.choice(tools)
            arguments = maker.arguments(chosen["parameters"], chosen["parameters"])
            jsonschema.validate(arguments, chosen["parameters"])
            made.append((chosen["name"], dict(rng.sample(list(arguments.items()), len(arguments)))))
        text = block(*made)
        assert bench.rejected(constraint, text) is None, text
        parsed = read(text, tools)
        assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == made


# What an answer is bound to


def test_nothing_is_bound_where_nothing_can_come() -> None:
    assert bound_or_none() is None
    assert bound_or_none([tool()], mode="none") is None
    assert bound_or_none([tool()], mode="none", thinking=True) is None


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "more, after, lead",
    [
        ({}, (DSML,), ""),
        ({"mode": "required"}, (), f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="'),
        ({"mode": "required", "name": "g"}, (), f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="g">\n'),
        ({"mode": "required", "schema": {"type": "object"}}, (), f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="'),
        ({"schema": {"type": "object"}}, (), ""),
        ({"schema": {"type": "object"}, "mode": "none"}, (), ""),
    ],
)
def test_the_grammar_begins_behind_the_thinking_or_the_first_dsml_token(
    bench: Bench, more: dict[str, Any], after: tuple[str, ...], lead: str, thinking: bool
) -> None:
    tools = [tool("f", properties={"p": {"type": "integer"}}), tool("g", properties={}), tool("h")]
    constraint = bound(tools, thinking=thinking, **more)
    assert constraint.after == ((THINK_END, *after) if thinking else after)
    assert constraint.lead == lead
    assert constraint.schema == (more["schema"] if more.get("mode") == "none" else None)
    begins = set()
    for seed in range(12):
        text = bench.walk(constraint, random.Random(seed))
        assert text.startswith(lead)
        begins.add(text[:1])
        if text.startswith("{"):
            json.loads(text)
            continue
        if constraint.after[-1:] != (DSML,):
            assert text.startswith(f"\n\n<{DSML}")
            text = text.removeprefix(f"\n\n<{DSML}")
        names = {call.name for call in read(text, tools).tool_calls}
        assert names <= ({more["name"]} if "name" in more else {"f", "g", "h"})
    both = "schema" in more and "mode" not in more
    assert begins == ({"{", "\n"} if both else {"{"} if more.get("mode") == "none" else {"\n"} if lead else {"t"})


def test_one_call_alone_where_calls_are_not_parallel(bench: Bench) -> None:
    tools = [tool("f", properties={}), tool("g", properties={})]
    two = block(("f", {}), ("g", {}))
    assert bench.accepts(bound(tools), two)
    rest = bench.rejected(bound(tools, parallel=False), two)
    assert rest is not None and rest.startswith(DSML), "only the end of the block may come behind the first call"
    assert bench.accepts(bound(tools, parallel=False), block(("g", {})))


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"tools": [], "mode": "required"}, "none is declared"),
        ({"tools": [tool("f")], "mode": "required", "name": "g"}, "'g' must be called but is not declared: use f"),
        ({"tools": [{"name": "f", "parameters": [1]}]}, "'f' are list: give a JSON schema of an object"),
        ({"tools": [{"name": "f", "parameters": "x"}]}, "'f' are str"),
        ({"tools": [{"name": "f", "parameters": False}]}, "no arguments fit the parameters of tool 'f'"),
        ({"tools": [tool(required=[1])]}, "holds \\[1\\]: give names"),
        ({"tools": [tool('a"b')]}, "cannot be written in DSML"),
        ({"tools": [tool(f"a{DSML}b")]}, "cannot be written in DSML"),
        ({"tools": [tool("a\ud800")]}, "cannot be written in DSML"),
        ({"tools": [tool("a" * 2000)]}, "cannot be written in DSML"),
        ({"tools": [tool(properties={'a"b': {}}, required=['a"b'])]}, "parameter 'a\"b' cannot be written"),
        ({"tools": [tool(properties={'a"b': {}}, strict=True)]}, "parameter 'a\"b' cannot be written"),
        ({"schema": []}, "response schema is list"),
        ({"schema": "x"}, "response schema is str"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        bound_or_none(**given)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"p": schema}, "required": ["p"]}
    return schema


SLOPPY: list[tuple[Any, str]] = [
    ({"type": "banana"}, "type is 'banana'"),
    ({"type": 7}, "type is '7'"),
    ({"type": "string", "enum": "abc"}, "enum is no list"),
    ({"type": "string", "enum": []}, "enum is no list"),
    ({"type": "string", "enum": [1, 2]}, "type and enum exclude each other"),
    ({"type": "string", "minLength": -1}, "minLength is -1"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength and maxLength exclude each other"),
    ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
    ({"type": "string", "pattern": "(a"}, "pattern"),
    ({"type": "string", "pattern": r"(a)\1"}, "pattern"),
    ({"type": "string", "pattern": r"\bword\b"}, "pattern"),
    ({"type": "string", "pattern": "^a{3}$", "maxLength": 2}, "pattern"),
    ({"type": "string", "format": "color"}, "format 'color'"),
    ({"type": "string", "not": {"const": "a"}}, "not cannot be enforced"),
    ({"type": "string", "enum": ["a", "b"], "pattern": "a"}, "beside another"),
    ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum and maximum exclude"),
    ({"type": "integer", "minimum": "3"}, "minimum is 3"),
    ({"type": "integer", "multipleOf": 0}, "multipleOf is 0"),
    ({"type": "integer", "multipleOf": -3}, "multipleOf is -3"),
    ({"type": "number", "multipleOf": 81.83189}, "multipleOf is 81"),
    ({"type": "integer", "minimum": 1, "maximum": 5, "multipleOf": 10}, "multipleOf is 10"),
    ({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf in a combination"),
    ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "no integer is between"),
    ({"type": "integer", "minimum": 2.1, "maximum": 2.9}, "no integer is between"),
    ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "minimum and exclusiveMaximum exclude"),
    ({"type": "number", "minimum": 1e300}, "minimum 1e\\+300 cannot be enforced"),
    ({"type": "array", "items": 5}, "'5' is no schema"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems cannot be enforced"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains cannot be enforced"),
    ({"type": "object", "properties": ["a"]}, "properties are no object"),
    ({"type": "object", "properties": {"a": {"type": "string", "required": True}}}, "required is True"),
    ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if cannot be enforced"),
    ({"type": "object", "patternProperties": {"^a": {}, "^b": {}}}, "patternProperties cannot be enforced"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired of a nested object"),
    ({"type": "object", "properties": {f"a{DSML}": {}}, "required": [f"a{DSML}"]}, "cannot be written"),
    ({"type": "object", "unevaluatedProperties": {"type": "integer"}}, "unevaluatedProperties cannot"),
    ({"allOf": [{"type": "object"}], "unevaluatedProperties": False}, "unevaluatedProperties of a combination"),
    ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "no arguments fit its parameters"),
    (
        {"type": "array", "items": {"type": "object", "required": ["a"], "additionalProperties": False}, "minItems": 1},
        "no",
    ),
    (False, "no arguments fit its parameters"),
    ({"$ref": "#/$defs/missing"}, "points to nothing here"),
    ({"$ref": "https://example.com/schema.json"}, "points to nothing here"),
    ({"$ref": "#/properties/p"}, "no arguments fit its parameters"),
    ({"anyOf": {}}, "anyOf is no list"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "no arguments fit its parameters"),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf of strings"),
    ({"enum": [f"a{DSML}b"]}, "no value of enum can be written"),
    (None, "'None' is no schema"),
    ("string", "'string' is no schema"),
    (nested(60), "nested more than"),
]


@pytest.mark.parametrize("schema, problem", SLOPPY)
def test_what_a_strict_tool_asks_in_vain_is_refused_and_a_lenient_one_goes_without(
    bench: Bench, schema: Any, problem: str
) -> None:
    with pytest.raises(InputError, match=f"tool 'f': .*{problem}"):
        bound(one(schema, strict=True))
    constraint = bound(one(schema))
    for seed in range(3):
        text = bench.walk(constraint, random.Random(seed))
        parsed = parse(f"\n\n<{DSML}{text}{EOS}", thinking=False, tools=one(schema))
        assert not parsed.repairs and parsed.tool_calls


def test_combinations_of_open_schemas_come_to_an_end(bench: Bench) -> None:
    """llguidance intersects what is combined; twice JSON of any kind would never be done."""
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}}
    parts = [
        {"type": "object", "properties": {"a": {}, "t": {}}},
        {"type": "object", "properties": {"a": {}, "b": True}, "required": ["a"]},
        {"type": "object", "properties": {"t": {"$ref": "#/$defs/Tree"}}},
        {"type": "object"},
    ]
    value = {"p": {"a": [1, {"k": "v"}], "t": {"children": [{"children": []}]}, "b": None}}
    for strict in (False, True):
        tools = [tool(strict=strict, properties={"p": {"allOf": parts}}, required=["p"], **{"$defs": {"Tree": tree}})]
        assert bench.accepts(bound(tools), block(("f", value)))
        assert not bench.accepts(bound(tools), block(("f", {"p": {"b": 1}})))


@pytest.mark.parametrize("schema", [{"oneOf": [{"type": "number"}, {"type": "integer"}]}])
def test_llguidance_refuses_what_it_cannot_enforce_of_a_strict_tool(bench: Bench, schema: Any) -> None:
    with pytest.raises(InputError, match="is invalid"):
        bench.start(bound(one(schema, strict=True)))
    bench.walk(bound(one(schema)), random.Random(1))


# The form of calls

FORM = [
    tool("f", properties={"a": {"type": "string"}, "n": {"type": "integer"}}, required=["a"]),
    tool("g", properties={}),
]
WHOLE = f"""tool_calls>
<{DSML}invoke name="f">
<{DSML}parameter name="n" string="false">12</{DSML}parameter>
<{DSML}parameter name="a" string="true">some <b>text</b> &
{{"x": </p</{DSML}parameter>
</{DSML}invoke>
<{DSML}invoke name="g">

</{DSML}invoke>
</{DSML}tool_calls>"""


@pytest.mark.parametrize(
    "old, new, left",
    [
        ("tool_calls>\n<", "function_calls>\n<", "function_calls"),
        ("tool_calls>\n<", "tool_calls><", "<"),
        ('name="f"', 'name="h"', 'h">'),
        ('name="f"', 'name="F"', 'F">'),
        ('name="n"', 'name="m"', 'm" string'),
        ('name="n"', 'name="a"', '="false">12'),
        ('"n" string="false">12', '"n" string="true">12', '="true">12'),
        (">12<", "> 12<", " 12"),
        (">12<", ">012<", "12<"),
        (">12<", ">1.5<", ".5"),
        (">12<", '>"12"<', '"12"'),
        (">12<", ">NaN<", "N"),
        (">12<", ">Infinity<", "Inf"),
        (">12<", ">null<", "null"),
        ('name="n" string="false">12', 'name="a" string="true">12', "a"),  # and then a again
        (
            f'</{DSML}parameter>\n</{DSML}invoke>\n<{DSML}invoke name="g">',
            f'</{DSML}parameter>\n</{DSML}invoke>\n<{DSML}invoke name="f">',
            f"\n\n</{DSML}invoke",
        ),
        (f'"g">\n\n</{DSML}', f'"g">\n</{DSML}', "</"),
        (f'"g">\n\n</{DSML}', f'"g">\n\n\n</{DSML}', "\n\n"),
        (f'"g">\n\n</{DSML}', f'"g">\n<{DSML}', "<"),
        (f"</{DSML}tool_calls>", f"</{DSML}tool_calls>\n", "\n"),
        (f"</{DSML}tool_calls>", f"</{DSML}tool_calls> and more", " and"),
        (f"</{DSML}tool_calls>", f"</{DSML}tool_calls><{DSML}tool_calls>", "<"),
        ("some <b>", f"some {THINK_END}<b>", THINK_END),
        ("some <b>", f"some {EOS}<b>", EOS),
        ("some <b>", f"some <{DSML}b>", DSML),
    ],
)
def test_nothing_but_the_form_is_let_through(bench: Bench, old: str, new: str, left: str) -> None:
    constraint = bound(FORM)
    assert bench.accepts(constraint, WHOLE)
    text = WHOLE.replace(old, new, 1)
    assert text != WHOLE
    rest = bench.rejected(constraint, text)
    assert rest is not None
    assert not bench.tokenizer.decode(bench.ids(text)).endswith(rest) or left.strip() in rest[:90], rest


def test_the_whole_block_is_what_the_encoder_writes(bench: Bench) -> None:
    made = [("f", {"n": 12, "a": 'some <b>text</b> &\n{"x": </p'}), ("g", {})]
    assert block(*made) == WHOLE
    assert [(c.name, json.loads(c.arguments)) for c in read(WHOLE, FORM).tool_calls] == made


def test_required_parameters_come_and_none_comes_twice(bench: Bench) -> None:
    names = ["a", "b", "c", "d"]
    tools = [tool(properties={name: {"type": "integer"} for name in names}, required=["b", "d"])]
    constraint = bound(tools)
    rng = random.Random(5)
    for count in range(5):
        for chosen in itertools.permutations(names, count):
            text = block(("f", dict.fromkeys(chosen, 1)))
            assert bench.accepts(constraint, text) == ({"b", "d"} <= set(chosen)), chosen
            if chosen:
                line = f'<{DSML}parameter name="{rng.choice(chosen)}" string="false">1</{DSML}parameter>\n'
                twice = text.replace(f"</{DSML}invoke>", f"{line}</{DSML}invoke>")
                assert not bench.accepts(constraint, twice)


@pytest.mark.parametrize("required", [0, 3, 20])
def test_many_parameters_come_in_any_order_and_very_many_in_that_of_the_schema(bench: Bench, required: int) -> None:
    rng = random.Random(required)
    for count, free in ((40, True), (56, True), (57, False), (130, False)):
        names = [f"p{i}" for i in range(count)]
        needed = rng.sample(names, required)
        tools = [tool(properties={name: {"type": "integer"} for name in names}, required=needed)]
        constraint = bound(tools)
        assert bench.accepts(constraint, block(("f", {}))) == (not required)
        for _ in range(3):
            chosen = [name for name in names if name in needed or rng.random() < 0.3]
            ordered = block(("f", dict.fromkeys(chosen, 1)))
            assert bench.accepts(constraint, ordered)
            shuffled = rng.sample(chosen, len(chosen))
            assert bench.accepts(constraint, block(("f", dict.fromkeys(shuffled, 1)))) == (free or shuffled == chosen)
            if needed:
                chosen.remove(needed[0])
                assert not bench.accepts(constraint, block(("f", dict.fromkeys(chosen, 1))))
        read(bench.walk(constraint, rng, most=20_000), tools)


def test_how_many_parameters_and_which_together(bench: Bench) -> None:
    letters = {name: {"type": "integer"} for name in "abcd"}

    def accepted(**more: Any) -> set[str]:
        tools = [tool(properties=letters, strict=True, **more)]
        constraint = bound(tools)
        read(bench.walk(constraint, random.Random(3)), tools)
        sets = ("".join(s) for n in range(5) for s in itertools.combinations("abcd", n))
        return {s for s in sets if bench.accepts(constraint, block(("f", dict.fromkeys(reversed(s), 1))))}

    every = accepted()
    assert len(every) == 16
    assert accepted(minProperties=2) == {s for s in every if len(s) >= 2}
    assert accepted(maxProperties=1) == {s for s in every if len(s) <= 1}
    assert accepted(maxProperties=3, required=["a", "b"]) == {s for s in every if {"a", "b"} <= set(s) and len(s) <= 3}
    assert accepted(maxProperties=2, required=["a", "b"]) == {"ab"}
    assert accepted(dependentRequired={"a": ["b", "c"]}) == {s for s in every if "a" not in s or {"b", "c"} <= set(s)}
    either = [{"required": ["a"]}, {"required": ["b", "c"]}]
    assert accepted(anyOf=either) == {s for s in every if "a" in s or {"b", "c"} <= set(s)}
    assert accepted(allOf=[{"required": ["d"]}]) == {s for s in every if "d" in s}


def test_parameters_that_no_schema_declares(bench: Bench) -> None:
    def accepts(arguments: dict[str, Any], **tool_: Any) -> bool:
        return bench.accepts(bound([{"name": "f", **tool_}]), block(("f", arguments)))

    free = {"any thing": "text", "größe": [1, {"k": "v"}], "n": 1, "o": None}
    for parameters in ({"type": "object"}, {}, True, {"type": "object", "additionalProperties": True}):
        assert accepts(free, parameters=parameters)
        assert accepts({}, parameters=parameters)
        assert not accepts(free | {"five": 5}, parameters=parameters), "four are enough"
    for closed in (None, {"type": "object", "properties": {}}, {"type": "object", "additionalProperties": False}):
        assert accepts({}, parameters=closed)
        assert not accepts({"a": 1}, parameters=closed)
    assert not accepts(free, parameters={"type": "object"}, strict=True)
    numbers = {"n": {"type": "integer"}, "o": {"type": "integer"}}
    declared: dict[str, Any] = {"type": "object", "properties": numbers, "required": ["n"]}
    assert not accepts({"n": 1, "m": 1}, parameters=declared)
    declared["additionalProperties"] = {"type": "string"}
    assert accepts({"m": "x", "n": 1, "k": ""}, parameters=declared)
    assert not accepts({"m": "x"}, parameters=declared)
    assert not accepts({"n": 1, "m": 1}, parameters=declared)
    assert not accepts({"n": 1, "o": "1"}, parameters=declared), "a declared name is not free"
    assert not accepts({"n": 1, "a<b": "x"}, parameters=declared)
    assert not accepts({"n": 1, "x" * 65: "x"}, parameters=declared)
    tools = [{"name": "f", "input_schema": declared}]
    for seed in range(10):
        text = bench.walk(bound(tools), random.Random(seed))
        parsed = parse(f"\n\n<{DSML}{text}{EOS}", thinking=False, tools=tools)
        assert {repair.name for repair in parsed.repairs} <= {"duplicate_parameter"}
        jsonschema.validate(json.loads(parsed.tool_calls[0].arguments), declared)


def test_odd_names_are_written_as_they_are(bench: Bench) -> None:
    names = ["<[7]>", "a\\b", "line\nbreak", "｜", "\x7f\t", "🐟 fish", "//", "%json {", "a'b", "</x>"]
    tools = [
        tool(name, properties={key: {"type": "string"} for key in names}, required=names[:2], strict=True)
        for name in names
    ]
    constraint = bound(tools)
    for i, name in enumerate(names):
        made = (name, {key: key for key in (*names[:2], *names[i:])})
        assert bench.accepts(constraint, block(made))
        (call,) = read(block(made), tools).tool_calls
        assert (call.name, json.loads(call.arguments)) == made
    for seed in range(5):
        read(bench.walk(constraint, random.Random(seed)), tools)


def test_a_schema_cannot_break_out_of_its_place(bench: Bench) -> None:
    """Text of a caller that looks like grammar: special tokens, rules, the end of a string."""
    evil = '"} <[7]> | start\nstart: /.*/ \x00 %ignore'
    schema = {"type": "object", "properties": {evil: {"const": evil}}, "required": [evil], "description": evil}
    tools = [tool(properties={"a": schema, "b": {"enum": [evil]}, "c": {"const": [evil]}}, required=["a", "b", "c"])]
    made = ("f", {"a": {evil: evil}, "b": evil, "c": [evil]})
    constraint = bound(tools)
    assert bench.accepts(constraint, block(made))
    (call,) = read(bench.walk(constraint, random.Random(0)), tools).tool_calls
    assert json.loads(call.arguments) == made[1]
    assert {piece.text for piece in constraint.grammar if piece.special} == {DSML}


def test_special_tokens_are_written_by_number() -> None:
    grammar = (Piece("start: "), Piece(DSML, special=True), Piece(' "<[1]>" '), Piece(EOS, special=True))
    assert lark_text(grammar, {DSML: 7, EOS: 1}.__getitem__) == 'start: <[7]> "<[1]>" <[1]>'


# Values

S, J = True, False  # string="true", string="false"


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        ({"type": "string"}, [(S, ""), (S, "</"), (S, "a\n</x"), (S, "12"), (S, "｜DSM｜")], [(J, '"a"'), (J, "1")]),
        (
            {"type": "string", "enum": ["a", "", "a b"]},
            [(S, "a"), (S, ""), (S, "a b")],
            [(S, "b"), (S, " a"), (J, '"a"')],
        ),
        ({"const": "x"}, [(S, "x")], [(S, ""), (S, "xx"), (J, '"x"')]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, [(S, "é🐟"), (S, "</a")], [(S, "a"), (S, "abcd")]),
        ({"type": "string", "maxLength": 100_000}, [(S, "a" * 500)], []),
        ({"type": "string", "pattern": "^a+$"}, [(S, "aa")], [(S, ""), (S, "ab"), (S, "ba")]),
        ({"type": "string", "pattern": "a", "maxLength": 4}, [(S, "xay")], [(S, "xy"), (S, "aaaaa")]),
        ({"minLength": 1}, [(S, "x")], [(S, ""), (J, "1")]),
        (
            {"type": "integer"},
            [(J, "0"), (J, "-12"), (J, "9" * 30)],
            [(J, "1.5"), (J, "1e3"), (J, "01"), (S, "1"), (J, " 1")],
        ),
        (
            {"type": "integer", "minimum": 3, "exclusiveMaximum": 12},
            [(J, "3"), (J, "11")],
            [(J, "2"), (J, "12"), (J, "30")],
        ),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [(J, "7"), (J, str(2**61))], [(J, "-1")]),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, [(J, "1")], [(J, "0")]),
        (
            {"type": "number"},
            [(J, "1"), (J, "-0.5e+3"), (J, "1E5")],
            [(J, "NaN"), (J, "Infinity"), (J, "-Infinity"), (J, ".5")],
        ),
        ({"type": "number", "multipleOf": 0.5}, [(J, "2.5"), (J, "3")], [(J, "2.3")]),
        ({"type": "boolean"}, [(J, "true"), (J, "false")], [(J, "True"), (J, "1"), (S, "true")]),
        ({"type": "null"}, [(J, "null")], [(J, "None"), (S, "")]),
        ({"type": ["string", "null"]}, [(S, "null"), (J, "null")], [(J, '"a"'), (J, "1")]),
        ({"type": "string", "nullable": True}, [(S, "x"), (J, "null")], [(J, "1")]),
        ({"type": ["string", "integer"], "minimum": 3, "maxLength": 2}, [(S, "ab"), (J, "3")], [(S, "abc"), (J, "2")]),
        (
            {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
            [(S, "ab"), (J, "null")],
            [(S, "abc"), (J, "1")],
        ),
        (
            {"oneOf": [{"const": "a"}, {"const": 1}, {"const": "b"}]},
            [(S, "a"), (S, "b"), (J, "1")],
            [(S, "c"), (J, "2")],
        ),
        (
            {"enum": ["a", 1, None, [1, "x"], {"k": 2}]},
            [(S, "a"), (J, "1"), (J, "null"), (J, '[1, "x"]'), (J, '{"k": 2}')],
            [(J, '"a"'), (S, "1"), (J, "[1,2]")],
        ),
        ({"allOf": [{"$ref": "#/$defs/S"}], "description": "x"}, [(S, "ab")], [(S, "abcd"), (J, "1")]),
        ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, [(S, "ab")], [(S, "abc"), (J, "1")]),
        ({"$ref": "#/$defs/S"}, [(S, "ab")], [(S, "abcd")]),
        ({"$ref": "#/definitions/a~1b%20c"}, [(J, "5")], [(J, "4"), (S, "5")]),
        ({"$ref": "#/$defs/Loop"}, [(S, "x"), (J, '{"loop": {"loop": "x"}}')], [(J, '"x"'), (J, '{"loop": 1}')]),
        ({"anyOf": [{"$ref": "#"}, {"const": "x"}]}, [(S, "x"), (J, '{"p": {"p": "x"}}')], [(J, '{"q": 1}'), (S, "y")]),
        (True, [(S, "x"), (J, "1"), (J, '[{"a": "b"}, null]')], [(J, '"x"'), (J, "[1,2]"), (J, '{"a":1}')]),
        (
            {"type": "array", "items": {"type": "string"}},
            [(J, "[]"), (J, '["a", "</b"]')],
            [(J, '["a","b"]'), (J, "[1]"), (S, "[]")],
        ),
        (
            {"items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
            [(J, "[1, 2]")],
            [(J, "[1]"), (J, "[1, 2, 3, 4]"), (S, "x")],
        ),
        (
            {"type": "array", "items": [{"type": "integer"}], "additionalItems": False},
            [(J, "[1]")],
            [(J, '["a"]'), (J, "[1, 2]")],
        ),
        (
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            [(J, '{"a": 1}')],
            [(J, "{}"), (J, '{"a": 1, "b": 2}'), (S, "x")],
        ),
        ({"type": "object"}, [(J, "{}"), (J, '{"x": [{}]}')], [(J, "[]"), (S, "{}")]),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            [(J, '{"x": 1, "y": 2}')],
            [(J, '{"x": "1"}')],
        ),
        (
            {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False},
            [(J, '{"x-a": 1}')],
            [(J, '{"a": 1}'), (J, '{"x-a": ""}')],
        ),
        ({"type": "string", "format": "color"}, [(S, "red")], []),
        (
            {"properties": {"enum": {"$ref": "#/$defs/S"}, "$ref": {"type": "string"}, "type": {"type": "integer"}}},
            [(J, '{"enum": "ab", "$ref": "#", "type": 1}')],
            [(J, '{"enum": "abcd"}'), (J, '{"$ref": 1}')],
        ),
    ],
)
def test_values_are_typed_by_their_schema(
    bench: Bench, schema: Any, good: list[tuple[bool, str]], bad: list[tuple[bool, str]]
) -> None:
    more = {
        "$defs": {
            "S": {"type": "string", "maxLength": 3},
            "Loop": {
                "anyOf": [{"type": "string"}, {"type": "object", "properties": {"loop": {"$ref": "#/$defs/Loop"}}}]
            },
        },
        "definitions": {"a/b c": {"type": "integer", "minimum": 5}},
    }
    tools = [tool(properties={"p": schema}, required=["p"], **more)]
    constraint = bound(tools)

    def accepts(text: bool, value: str) -> bool:
        spelled = f'<{DSML}parameter name="p" string="{str(text).lower()}">{value}</{DSML}parameter>'
        return bench.accepts(
            constraint, f'tool_calls>\n<{DSML}invoke name="f">\n{spelled}\n</{DSML}invoke>\n</{DSML}tool_calls>'
        )

    assert [value for value in good if not accepts(*value)] == []
    assert [value for value in bad if accepts(*value)] == []
    for seed in range(3):
        parsed = parse(f"\n\n<{DSML}{bench.walk(constraint, random.Random(seed))}", thinking=False, tools=tools)
        assert parsed.tool_calls and not parsed.repairs


@pytest.mark.parametrize(
    "form, good, bad",
    [
        ("date", ["2024-02-29", "1999-12-31"], ["2024-13-01", "2024-04-31", "24-1-1", ""]),
        ("time", ["23:59:59Z", "08:00:00.123+02:00"], ["24:00:00Z", "08:00"]),
        ("date-time", ["2024-01-31T08:00:00Z"], ["2024-01-31 08:00:00Z", "2024-01-31"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        ("ipv4", ["127.0.0.1", "255.255.255.255"], ["256.0.0.1", "1.2.3"]),
        ("ipv6", ["fe80::1", "1:2:3:4:5:6:7:8", "::1"], ["1:2:3", "g::1", "1::2::3"]),
        ("email", ["a.b+c@example.org"], ["a@", "a b@example.org"]),
        ("hostname", ["example.org", "a"], ["-a", "a_b"]),
        ("uri", ["https://example.org/a?b=c#d", "mailto:a@b.c"], ["example.org", "https://a b"]),
        ("duration", ["P1D", "PT5M", "P3W"], ["5 minutes", "P"]),
    ],
)
def test_strict_tools_hold_formats_and_lenient_ones_take_them_as_remarks(
    bench: Bench, form: str, good: list[str], bad: list[str]
) -> None:
    schema = {"type": "string", "format": form}
    strict, lenient = bound(one(schema, strict=True)), bound(one(schema))
    held = bound(one({"type": "array", "items": schema}, strict=True))
    for text in good:
        assert bench.accepts(strict, block(("f", {"p": text}))), text
        assert bench.accepts(held, block(("f", {"p": [text]}))), text
    for text in bad:
        assert not bench.accepts(strict, block(("f", {"p": text}))), text
        assert not bench.accepts(held, block(("f", {"p": [text]}))), text
        assert bench.accepts(lenient, block(("f", {"p": text}))), text


PATTERNS = [
    "", "a", "^a", "a$", "^a$", "a|b", "^a|b$", "^(a|b)$", "^(?:ab)+$", "^[a-c]*$", "[^a]$", "^.$", r"^\d+$", r"^\w+$",
    r"^\s$", r"^\D\W\S$", "^a{2}$", "^a{2,}$", "^a{1,2}b?$", "^(a{0,1}b){2}$", r"^\.\/\-$", r"^[\d.-]+$", r"^[\]\[^-]$",
    "^[^]$", r"^\x41\u0042$", r"^\u{1F41F}$", r"^\uD83D\uDC1F$", "^é$", r"^[\u00e0-\u00ff]+$", r"^a*?b$", "^(?<n>a)b$",
    r"^\t\n$", "^ab|^cd|ef$", r"^[a\-z]+$", r"^[\w-]+@[\w-]+\.[a-z]{2,}$",
]  # fmt: skip
TEXTS = [
    "", "a", "b", "aa", "ab", "ba", "aab", "abab", "c", "cd", "ef", "abcd", "1", "12", "1.5", "-", ".", "./-", "]", "^",
    "[", " ", "é", "éà", "🐟", "AB", "x\ny", "\t\n", "_", "a-z", "a@b.org", "a b", "x1!", "bb", "aaa", "z",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_json_schema(bench: Bench, pattern: str) -> None:
    """Against Python's expressions, which agree on these."""
    python = pattern.replace("(?<n>", "(?P<n>").replace("[^]", r"[\s\S]").replace(r"\u{1F41F}", "🐟")
    python = re.sub("[$]", r"\\Z", python.replace(r"\uD83D\uDC1F", "🐟"))
    expression = re.compile(python, re.ASCII)
    raw, quoted = (
        bound(one({"type": "string", "pattern": pattern}, strict=True)),
        bound(one({"type": "array", "items": {"type": "string", "pattern": pattern}}, strict=True)),
    )
    for text in TEXTS:
        found = expression.search(text) is not None
        assert bench.accepts(raw, block(("f", {"p": text}))) == found, text
        assert bench.accepts(quoted, block(("f", {"p": [text]}))) == found, text


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a)",
        "[",
        "[]",
        "a**",
        "a{2",
        "a{,2}",
        "a{2,1}",
        "a{999999}",
        "*",
        "+a",
        "{2}",
        "(?=a)",
        "(?!a)",
        "(?<=a)",
        "(?<!a)",
        r"\1",
        r"\ba",
        r"\p{L}",
        "a^b",
        "a$b",
        "(^a)",
        r"\u{110000}",
        r"\u12",
        r"\x1",
        r"\ud800",
        "\ud800",
        "\\",
        r"[z-a]",
        r"[a-\d]",
        "(?i)a",
        "(?<n",
        "(" * 60 + ")" * 60,
        "a??+",
        5,
        None,
    ],
)
def test_patterns_without_a_counterpart_are_left_out(bench: Bench, pattern: Any) -> None:
    schema = {"type": "string", "pattern": pattern}
    if pattern is not None:
        with pytest.raises(InputError, match=r"pattern .* cannot be enforced"):
            bound(one(schema, strict=True))
    assert bench.accepts(bound(one(schema)), block(("f", {"p": "anything"})))


@pytest.mark.parametrize(
    "schema, value",
    [
        ({"type": "string"}, "{}"),
        ({"type": ["string", "null"]}, "{}"),
        (True, ["{}"]),
        (True, {"k": "{}"}),
        (True, {"{}": 1}),
        ({"type": "array", "items": {"type": "string"}}, ["{}"]),
        ({"type": "array"}, [["{}"]]),
        ({"type": "string", "maxLength": 80}, "{}"),
        ({"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 80}}, ["  {}"]),
        ({"type": "object"}, {"a": {"b": "{}"}}),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"a": "{}"}),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"b": "{}"}),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/L"}]}, ["{}"]),
    ],
)
def test_values_cannot_spell_the_marks_that_would_end_them(bench: Bench, schema: Any, value: Any) -> None:
    """Ordinary tokens could: the parser reads text."""
    tools = [tool(properties={"p": schema}, required=["p"], **{"$defs": {"L": {"type": "array"}}})]

    def holding(text: str) -> list[int]:
        filled = json.loads(json.dumps(value).replace("{}", "@@"))
        before, after = block(("f", {"p": filled})).split("@@", 1)
        return [*bench.ids(before), *bench.tokenizer.encode(text), *bench.ids(after)]

    for text in ("｜", "x｜DSM｜L｜", "end▁of▁sentence", "</parameter>", "｜User｜", "<｜DSML>"):
        assert bench.accepts(bound(tools), holding(text)), text
    for text in MARKED:
        assert not bench.accepts(bound(tools), holding(text)), text


MARKED = (DSML, f"</{DSML}parameter>", f"a ｜｜DSML｜{DSML}", EOS, f"<{DSML}/")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": MARKED},
        {"type": "string", "pattern": "x|."},
        {"type": "string", "pattern": r"^[\s\S]*$"},
        {"type": "string", "pattern": r"^\W*\D*\S*$"},
        {"type": "string", "pattern": "^[^a]*$"},
        {"type": "string", "pattern": r"^[\u0000-\uffff]*$"},
        {"type": "string", "pattern": "^[a-zDSML｜▁<>/ ]*$"},
        {"type": "string", "minLength": 15},
    ],
)
def test_patterns_long_texts_and_enums_have_no_bars(bench: Bench, schema: dict[str, Any]) -> None:
    """There the expression alone must do: llguidance cannot always tell what two of them have in common."""
    raw, quoted = bound(one(schema)), bound(one({"type": "array", "items": schema}))
    for text in (f"x{'</' * 9}{mark}" for mark in MARKED):
        before, after = block(("f", {"p": "@@"})).split("@@")
        ids = [*bench.ids(before), *bench.tokenizer.encode(text), *bench.ids(after)]
        assert not bench.accepts(raw, ids), text
        before, after = block(("f", {"p": ["@@"]})).split("@@")
        ids = [*bench.ids(before), *bench.tokenizer.encode(text), *bench.ids(after)]
        assert not bench.accepts(quoted, ids), text
    if "enum" not in schema:
        assert bench.accepts(raw, block(("f", {"p": f"x{'</' * 9}"})))
        assert bench.accepts(quoted, block(("f", {"p": [f"x{'</' * 9}"]})))


def test_no_special_token_comes_within_values(bench: Bench) -> None:
    constraint = bound([tool(properties={"a": {"type": "string"}, "b": True}, required=["a", "b"])])
    specials = [bench.tokenizer.special(token) for token in SPECIAL_TOKENS]
    matcher = bench.start(constraint)
    for token in bench.ids(block(("f", {"a": "x < y </z", "b": {"k": ["</", 1]}}))):
        allowed = [other for other in specials if matcher.allowed()[other]]
        assert allowed in ([], [bench.mark])
        assert (token == bench.mark) <= (allowed == [bench.mark])
        matcher.accept(token)


# JSON as an answer


@pytest.mark.parametrize("seed", range(20))
def test_content_is_json_of_its_schema(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    schema = Maker(rng).tool("f", 5)["parameters"]
    constraint = bound(schema=schema)
    for _ in range(3):
        text = bench.walk(constraint, rng)
        jsonschema.validate(json.loads(text, parse_constant=pytest.fail), schema)
        parsed = parse(text + EOS, thinking=False)
        assert not parsed.repairs and parsed.content == text
    value = Maker(rng).arguments(schema, schema)
    assert bench.accepts(constraint, json.dumps(value, ensure_ascii=False))


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        (
            {"type": "object"},
            ["{}", '{"a": [1, null]}'],
            ["[]", '{"a":1}', '{"a": NaN}', " {}", "{}\n", '{"a": "<｜User｜>"}'],
        ),
        ({"type": "string"}, ['"a"', '"｜"'], ["a", f'"{EOS}"', f'"<{DSML}"']),
        ({"$ref": "#/$defs/N", "$defs": {"N": {"enum": [1, "x"]}}}, ["1", '"x"'], ["2", "x"]),
        ({}, ["1", '"x"', "[]"], ["x"]),
        (True, ["null"], ["nul"]),
    ],
)
def test_content_may_be_any_json_that_fits(bench: Bench, schema: Any, good: list[str], bad: list[str]) -> None:
    constraint = bound(schema=schema)
    assert [text for text in good if not bench.accepts(constraint, bench.tokenizer.encode(text))] == []
    assert [text for text in bad if bench.accepts(constraint, bench.tokenizer.encode(text))] == []


def test_a_strict_response_schema_is_enforced_whole_or_refused(bench: Bench) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    with pytest.raises(InputError, match="the response schema: uniqueItems cannot be enforced"):
        bound(schema=schema, schema_strict=True)
    assert bench.accepts(bound(schema=schema), '{"a": [1, 1]}')
    del schema["properties"]["a"]["uniqueItems"]
    assert bench.accepts(bound(schema=schema, schema_strict=True), '{"a": [1, 1]}')


# Sizes


def test_recursion_comes_to_an_end(bench: Bench) -> None:
    loops = {
        "A": {"$ref": "#/$defs/B"},
        "B": {"$ref": "#/$defs/A"},
        "C": {"type": "object", "properties": {"c": {"$ref": "#/$defs/C"}}, "required": ["c"]},
        "D": {"anyOf": [{"$ref": "#/$defs/D"}, {"type": "integer"}]},
        "E": {"allOf": [{"$ref": "#/$defs/E"}, {"type": "integer"}]},
        **{f"X{i}": {"allOf": [{"$ref": f"#/$defs/X{i + 1}"}, {"$ref": f"#/$defs/X{i + 1}"}]} for i in range(40)},
        "X40": {"type": "string"},
    }
    for name in ("A", "B", "C", "E"):  # nothing can match these
        with pytest.raises(InputError, match="excludes every value"):
            bound([tool(properties={"p": {"$ref": f"#/$defs/{name}"}}, strict=True, **{"$defs": loops})])
        bench.walk(bound([tool(properties={"p": {"$ref": f"#/$defs/{name}"}}, **{"$defs": loops})]), random.Random(1))
    for name, value in (("D", 5), ("X0", "text")):
        tools = [tool(properties={"p": {"$ref": f"#/$defs/{name}"}}, **{"$defs": loops})]
        assert bench.accepts(bound(tools), block(("f", {"p": value})))
    whole = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}
    with pytest.raises(InputError):
        bound([{"name": "f", "parameters": whole}])
    bench.start(bound(one(nested(40))))
    chain = {f"L{i}": {"$ref": f"#/$defs/L{i + 1}"} for i in range(5000)} | {"L5000": {"type": "string"}}
    tools = [tool(properties={"p": {"$ref": "#/$defs/L0"}}, **{"$defs": chain})]
    with pytest.raises(InputError, match="too deeply"):
        bound(tools)
    links = {f"L{i}": {"type": "object", "properties": {"n": {"$ref": f"#/$defs/L{i + 1}"}}} for i in range(1000)}
    tools = [tool(properties={"p": {"$ref": "#/$defs/L0"}}, **{"$defs": links | {"L1000": {"type": "integer"}}})]
    assert bench.accepts(bound(tools), block(("f", {"p": {"n": {"n": {}}}})))


@pytest.mark.parametrize("count, most", [(64, 10), (300, 20)])
def test_many_tools_are_compiled_soon(bench: Bench, count: int, most: int) -> None:
    """What it takes is printed; beyond a size, lenient tools keep the kinds of their values only."""
    rng = random.Random(count)
    maker = Maker(rng)
    tools = []
    for i in range(count):
        names = [f"parameter_{j}" for j in range(most)]
        properties = {name: maker.schema(1) for name in names}
        made = maker.tool(f"tool_{i}", 0)
        made["parameters"] |= {"properties": properties, "required": names[: most // 2]}
        tools.append(made)
    begun = time.perf_counter()
    constraint = bound(tools)
    written = time.perf_counter()
    bench.start(constraint)
    compiled = time.perf_counter()
    bench.start(constraint)
    again = time.perf_counter()
    size = len(lark_text(constraint.grammar, bench.tokenizer.special))
    print(f"\n{count} tools of {most} parameters: {size:,} characters, written in {written - begun:.3f} s,", end=" ")
    print(f"compiled in {compiled - written:.3f} s, started again in {again - compiled:.6f} s")
    assert again - compiled < compiled - written
    parsed = read(bench.walk(constraint, rng, most=20_000), tools) if count == 64 else None
    assert parsed is None or parsed.tool_calls


def test_what_would_be_too_much_for_llguidance_is_refused_or_left_out(bench: Bench) -> None:
    number = {"type": "integer"}
    with pytest.raises(InputError, match="1001 tools are declared: give at most 1000"):
        bound([tool(f"f{i}") for i in range(1001)])
    many = [tool(f"f{i}", properties={"a": number}) for i in range(1000)]
    assert bench.accepts(bound(many), block(("f999", {"a": 1}), ("f0", {})))
    names = [f"p{i}" for i in range(3000)]
    parameters = {"properties": dict.fromkeys(names, number), "required": names[-5:]}
    with pytest.raises(InputError, match="more than 500 parameters"):
        bound([tool(strict=True, **parameters)])
    assert bench.accepts(bound([tool(**parameters)]), block(("f", dict.fromkeys(names[-5:], 1))))
    with pytest.raises(InputError, match="requires 501 parameters: give 500 at most"):
        bound([tool(**parameters | {"required": names[:501]})])
    with pytest.raises(InputError, match="more than 400 properties"):
        bound(one({"type": "object", **parameters}, strict=True))
    nested_ = bound(one({"type": "object", **parameters}))
    assert bench.accepts(nested_, block(("f", {"p": dict.fromkeys(names[-5:], 1) | {"p7": "x"}})))
    either = [{"required": [name]} for name in names[:20]]
    parameters = {"properties": dict.fromkeys(names[:50], number), "anyOf": either}
    with pytest.raises(InputError, match="so many alternatives"):
        bound([tool(strict=True, **parameters)])
    assert bench.accepts(bound([tool(**parameters)]), block(("f", dict.fromkeys(names[:50], 1))))
    product = [{"anyOf": [{"required": [f"{a}{b}"]} for b in range(10)]} for a in range(9)]
    bench.start(bound([tool(allOf=product)]))


def test_tools_are_taken_from_a_release_that_flags_its_tokens_as_ordinary(
    bench: Bench, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    layout = json.loads((bundled_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    for token in layout["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", tokenizer.vocab_size, END)
    matcher = compiler.start(Grammar("lark", 'start: TEXT "x"\nTEXT: /(?s:.*)<\\//'))
    assert not matcher.allowed()[[tokenizer.special(token) for token in SPECIAL_TOKENS]].any()
    other = Bench(tokenizer, compiler)
    assert other.accepts(bound(FORM), WHOLE)
    read(other.walk(bound(FORM), random.Random(2)), FORM)
