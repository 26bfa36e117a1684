"""Tools that are made up: a name, a description, a schema, and how a user asks for them.

A tool is a kind of action (tables/tool_kinds.toml) upon an object (words/tool_objects.txt), with parameters of a
table or of invented names. Objects and invented names are cut, so a held-out tool has a name never seen in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from abyssal.train.data.phrases import fill, with_article
from abyssal.train.data.pools import Split, pick, wide_pool
from abyssal.train.data.values import as_text, make_value, table

INVENTED = 0.2  # of the parameters have a name that nobody knows
INVENTED_VALUES = ("int:0:999", "float:0:50", "bool", "pool:things", "pool:adjectives", "code", "digits", "enum:")
GENERIC = 0.25  # of the values are given under the parameter's own name
QUOTED = ("title", "message", "keyword")  # several words, whose end only marks can show
QUALIFIED = 0.3  # of the objects are told apart by an adjective
# how clients write schemas, and how often: no descriptions of parameters, no empty list of required ones, no further
# parameters allowed, strict mode
FORMS = {"bare": 0.1, "short": 0.5, "closed": 0.25, "strict": 0.1}
PARTICLES = ("up", "out", "on", "off", "down")
TYPES = {"int": "integer", "float": "number", "bool": "boolean", "list": "array"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a tool.

    Attributes:
        name: in the schema.
        value: kind of its values (values.py).
        schema: its JSON schema.
        phrases: how a request gives the value, by `{value}`; for booleans, when it is true.
        phrases_false: for booleans, when it is false.
        required: whether a call must have it.
    """

    name: str
    value: str
    schema: dict[str, Any]
    phrases: tuple[str, ...]
    phrases_false: tuple[str, ...]
    required: bool

    @property
    def label(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")

    def draw(self, rng: np.random.Generator, split: Split) -> Any:
        """A value that the schema allows."""
        if "enum" in self.schema:
            return pick(rng, self.schema["enum"])
        return make_value(rng, split, self.value)

    def phrase(self, rng: np.random.Generator, value: Any) -> str:
        """How a request says it; the value is in it letter by letter."""
        if isinstance(value, bool):
            return pick(rng, self.phrases if value else self.phrases_false)
        if rng.random() < GENERIC:
            text = as_text(value)
            return f'with {self.label} "{text}"' if self.value in QUOTED else f"with {self.label} {text}"
        return pick(rng, self.phrases).replace("{value}", as_text(value))


@dataclass(frozen=True)
class Tool:
    """A tool and the words for it.

    Attributes:
        name: unique among the tools that are offered together.
        kind: of the action, a key of tables/tool_kinds.toml.
        object: what it acts on.
        description: one sentence.
        parameters: in the order of the schema.
        forms: which of `FORMS` its JSON has.
    """

    name: str
    kind: str
    object: str
    description: str
    parameters: tuple[Parameter, ...]
    forms: frozenset[str] = frozenset()

    @property
    def group(self) -> str:
        """Tools of one group and object do the same."""
        return str(table("tool_kinds")[self.kind]["group"])

    @property
    def article(self) -> str:
        """The object with the article that suits the action."""
        return with_article(self.object) if table("tool_kinds")[self.kind]["article"] == "a" else f"the {self.object}"

    def to_json(self) -> dict[str, Any]:
        """In OpenAI's form."""
        properties = {p.name: p.schema for p in self.parameters}
        if "bare" in self.forms:
            properties = {name: {k: v for k, v in p.items() if k != "description"} for name, p in properties.items()}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        required = [p.name for p in self.parameters if p.required]
        if required or "short" not in self.forms:
            schema["required"] = required
        if "closed" in self.forms:
            schema["additionalProperties"] = False
        function: dict[str, Any] = {"name": self.name, "description": self.description, "parameters": schema}
        if "strict" in self.forms:
            function["strict"] = True
        return {"type": "function", "function": function}

    def action(self, rng: np.random.Generator, *, it: bool = False) -> str:
        """How a request calls it: "look up the weather report", or "look it up" where that has been named."""
        kind = table("tool_kinds")[self.kind]
        verb = str(pick(rng, kind["verbs"]))
        before = kind.get("before", "")
        if not it:
            return f"{verb} {f'the {before}{self.object}' if before else self.article}"
        first, _, particle = verb.partition(" ")
        if particle in PARTICLES:
            return f"{first} it {particle}"
        return f"{verb} {f'the {before}it' if before else 'it'}"


def make_object(rng: np.random.Generator, split: Split) -> str:
    """Something a tool may act on."""
    thing = pick(rng, wide_pool("tool_objects", split))
    return f"{pick(rng, wide_pool('adjectives', split))} {thing}" if rng.random() < QUALIFIED else thing


def make_tool(
    rng: np.random.Generator,
    split: Split,
    *,
    kind: str | None = None,
    of: str | None = None,
    given: Sequence[Parameter] = (),
) -> Tool:
    """A tool.

    Args:
        rng: the only source of chance.
        split: part of the pools.
        kind: of the action; otherwise any.
        of: what it acts on; otherwise anything.
        given: parameters that it must have, besides others.
    """
    kind = kind or pick(rng, list(table("tool_kinds")))
    row = table("tool_kinds")[kind]
    thing = of or make_object(rng, split)
    description = fill(rng, split, pick(rng, row["descriptions"]), object=thing)
    wanted = int(rng.integers(0 if rng.random() < 0.15 else 1, 5))
    parameters = list(given)
    families = {p.name for p in given} | {"id" if p.value == "code" else "" for p in given}
    while len(parameters) < wanted + len(given):
        family, parameter = _parameter(rng, split)
        if family not in families and parameter.name not in {p.name for p in parameters}:
            families.add(family)
            parameters.append(parameter)
    in_order = tuple(parameters[i] for i in rng.permutation(len(parameters)))
    forms = frozenset(form for form, share in FORMS.items() if rng.random() < share)
    return Tool(_name(rng, pick(rng, row["names"]), thing), kind, thing, description, in_order, forms)


def parameter_for(rng: np.random.Generator, name: str, value: str, description: str) -> Parameter:
    """A required parameter that the caller has decided on."""
    return Parameter(name, value, _schema(rng, value, description), ("with {value}",), (), required=True)


def _name(rng: np.random.Generator, verb: str, thing: str) -> str:
    words = [*verb.split("_"), *thing.lower().split()]
    style = rng.random()
    if style < 0.65:
        return "_".join(words)
    if style < 0.8:
        return words[0] + "".join(word.capitalize() for word in words[1:])
    if style < 0.9:
        return "-".join(words)
    return "_".join([*words[1:], words[0]])


def _parameter(rng: np.random.Generator, split: Split) -> tuple[str, Parameter]:
    required = bool(rng.random() < 0.6)
    if rng.random() < INVENTED:
        name = f"{pick(rng, wide_pool('adjectives', split))}_{pick(rng, wide_pool('things', split))}"
        label = name.replace("_", " ")
        value = pick(rng, INVENTED_VALUES)
        if value == "enum:":
            value = "enum:" + ",".join(pick(rng, wide_pool("adjectives", split)) for _ in range(6))
        schema = _schema(rng, value, pick(rng, (f"The {label}.", f"Value of the {label}.", f"Sets the {label}.")))
        if value == "bool":
            on, off = (f"with the {label} on", f"and turn the {label} on"), (f"with the {label} off",)
            return name, Parameter(name, value, schema, on, off, required)
        told = (f"with {label} {{value}}", f"with {{value}} as the {label}", f"and set the {label} to {{value}}")
        return name, Parameter(name, value, schema, told, (), required)
    row = pick(rng, table("parameters")["parameter"])
    schema = _schema(rng, row["value"], pick(rng, row["descriptions"]))
    phrases, otherwise = tuple(row["phrases"]), tuple(row.get("phrases_false", ()))
    return row["family"], Parameter(pick(rng, row["names"]), row["value"], schema, phrases, otherwise, required)


def _schema(rng: np.random.Generator, value: str, description: str) -> dict[str, Any]:
    kind, _, rest = value.partition(":")
    schema: dict[str, Any] = {"type": TYPES.get(kind, "string"), "description": description}
    if kind == "list":
        schema["items"] = {"type": "string"}
    elif kind == "enum":
        options = sorted(set(rest.split(",")))
        chosen = rng.permutation(len(options))[: int(rng.integers(2, min(len(options), 6) + 1))]
        schema["enum"] = [options[i] for i in chosen]
    elif kind in ("int", "float") and rng.random() < 0.3:
        schema["minimum"], schema["maximum"] = map(int, rest.split(":"))
    return schema
