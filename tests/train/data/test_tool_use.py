"""Tools and calls: schemas hold, arguments can be read off, unseen tools stay unseen."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import pytest

from abyssal.train.data.example import MODES, Example
from abyssal.train.data.phrases import phrases
from abyssal.train.data.pools import SPLITS, entries, seeded, wide_pool
from abyssal.train.data.tool_use import KINDS, ToolUse
from abyssal.train.data.tools import FORMS, make_tool
from abyssal.train.data.values import as_text, make_value, table

MAKER = ToolUse()
EXAMPLES = [MAKER.generate(seeded("tools", "train", index), kind=kind) for kind in KINDS for index in range(80)]


def functions(example: Example) -> dict[str, Any]:
    return {tool["function"]["name"]: tool["function"] for tool in example.tools}


def calls_of(example: Example) -> list[tuple[int, str, dict[str, Any]]]:
    """Place of the message, name and arguments."""
    return [
        (place, call["function"]["name"], json.loads(call["function"]["arguments"]))
        for place, message in enumerate(example.messages)
        for call in message.get("tool_calls", [])
    ]


def test_calls_are_declared_and_obey_their_schemas() -> None:
    for example in EXAMPLES:
        declared = functions(example)
        assert len(declared) == len(example.tools), "two tools have one name"
        for function in declared.values():
            jsonschema.Draft202012Validator.check_schema(function["parameters"])
        for _, name, arguments in calls_of(example):
            schema = {**declared[name]["parameters"], "additionalProperties": False}
            jsonschema.validate(arguments, schema)


def test_every_argument_stands_in_what_came_before() -> None:
    for example in EXAMPLES:
        for place, name, arguments in calls_of(example):
            before = "\n".join(m["content"] for m in example.messages[:place] if m["role"] in ("user", "tool")).lower()
            for key, value in arguments.items():
                if not isinstance(value, bool):
                    told = as_text(value).lower()
                    assert told in before or json.dumps(told)[1:-1] in before, (name, key, value)


def test_kinds_make_the_calls_that_they_say() -> None:
    counts = {kind: [e for e in EXAMPLES if e.source == kind] for kind in KINDS}
    for example in counts["none_fits"] + counts["talk"]:
        assert not calls_of(example) and example.meta["calls"] == [[]]
    for example in counts["parallel"]:
        assert len({json.dumps(a) for _, _, a in calls_of(example)}) == 2
        assert len({name for _, name, _ in calls_of(example)}) == 1
    for example in counts["single"]:
        assert len(calls_of(example)) in (1, 2)
    for example in counts["two_steps"]:
        (one, _, _), (two, _, second) = calls_of(example)
        assert two == one + 2
        result = json.loads(example.messages[one + 1]["content"])
        assert any(key in result and result[key] == value for key, value in second.items())


def test_two_step_results_are_not_told_beforehand() -> None:
    told = 0
    for example in EXAMPLES:
        if example.source == "two_steps":
            (one, _, _), (_, _, second) = calls_of(example)
            asked = "".join(m["content"] for m in example.messages[:one])
            result = json.loads(example.messages[one + 1]["content"])
            told += all(as_text(second[k]) in asked for k, v in result.items() if second.get(k) == v)
    assert told <= 12  # short values such as a count of 3 may stand there by chance


def test_no_other_tool_does_what_is_wanted() -> None:
    near_by = 0
    for index in range(100):
        rng = seeded("tools", "train", index)
        wanted = make_tool(rng, "train")
        others = MAKER._offer(rng, [], wanted)
        assert (wanted.group, wanted.object) not in {(tool.group, tool.object) for tool in others}
        assert wanted.name not in {tool.name for tool in others}
        near_by += any(tool.object == wanted.object or tool.kind == wanted.kind for tool in others)
    assert near_by > 50, "most choices have a tool that is nearly right"


def test_when_none_fits_the_answer_says_so() -> None:
    for example in EXAMPLES:
        if example.source == "none_fits":
            answer = example.messages[-1]["content"]
            assert any(answer.startswith(phrase.split("{action}")[0]) for phrase in phrases("none_fits"))


def test_several_requests() -> None:
    maker = ToolUse(requests=(3, 5))
    numbers, kinds = set(), set()
    for index in range(60):
        example = maker.generate(seeded("requests", "train", index))
        asked = [place for place, m in enumerate(example.messages) if m["role"] == "user"]
        numbers.add(len(asked))
        declared = functions(example)
        for place, name, arguments in calls_of(example):
            request = max(p for p in asked if p < place)
            said = "\n".join(m["content"] for m in example.messages[request:place] if m["role"] in ("user", "tool"))
            assert name in declared and list(arguments) == [
                key for key in declared[name]["parameters"]["properties"] if key in arguments
            ]
            for value in arguments.values():
                if not isinstance(value, bool):
                    assert as_text(value).lower() in said.lower() or json.dumps(as_text(value))[1:-1] in said
        for start, end in zip(asked, [*asked[1:], len(example.messages)], strict=True):
            kinds.add(sum(len(m.get("tool_calls", [])) for m in example.messages[start:end]))
        assert example.meta["calls"] == [
            [
                {"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])}
                for c in m.get("tool_calls", [])
            ]
            for m in example.messages
            if m["role"] == "assistant"
        ]
    assert numbers >= {3, 4, 5} and min(numbers) == 3 and kinds == {0, 1, 2}


def test_modes_differ() -> None:
    for index in range(30):
        lengths = []
        for mode in MODES:
            example = MAKER.generate(seeded("tools", "train", index), kind="single", mode=mode)
            thought = [m.get("reasoning_content", "") for m in example.messages if m["role"] == "assistant"]
            assert all(thought) if mode != "non-think" else not any(thought)
            lengths.append(sum(map(len, thought)))
        assert lengths[0] < lengths[1] < lengths[2]


def test_unseen_tools_are_unseen() -> None:
    names = {
        split: {name for index in range(150) for name in functions(ToolUse(split).generate(seeded("t", split, index)))}
        for split in SPLITS
    }
    assert not names["train"] & names["held_out"]
    assert len(names["train"]) > 300 and len(names["held_out"]) > 300


def test_tools_differ_in_number_and_form() -> None:
    rng = seeded("t", "train", 0)
    made = [make_tool(rng, "train") for _ in range(400)]
    assert len({tool.name for tool in made}) > 380
    assert {len(tool.parameters) for tool in made} >= {0, 1, 2, 3, 4}
    types = {p.schema["type"] for tool in made for p in tool.parameters}
    assert types == {"string", "integer", "number", "boolean", "array"}
    assert {p.required for tool in made for p in tool.parameters} == {True, False}


def test_forms_of_schemas() -> None:
    rng = seeded("t", "train", 0)
    tool = next(t for t in (make_tool(rng, "train") for _ in range(100)) if len(t.parameters) > 1)
    plain, full = (dataclasses.replace(tool, forms=frozenset(forms)).to_json()["function"] for forms in ((), FORMS))
    assert "strict" not in plain and "additionalProperties" not in plain["parameters"]
    assert all("description" in p for p in plain["parameters"]["properties"].values())
    assert full["strict"] is True and full["parameters"]["additionalProperties"] is False
    assert not any("description" in p for p in full["parameters"]["properties"].values())
    optional = tuple(dataclasses.replace(p, required=False) for p in tool.parameters)
    loose = dataclasses.replace(tool, parameters=optional, forms=frozenset())
    assert loose.to_json()["function"]["parameters"]["required"] == []
    short = dataclasses.replace(loose, forms=frozenset({"short"}))
    assert "required" not in short.to_json()["function"]["parameters"]


def test_values_of_the_tables() -> None:
    """Every kind that a table names can be drawn, from the right part."""
    kinds = [row["value"] for row in table("parameters")["parameter"]] + list(table("results").values())
    for split in SPLITS:
        rng = seeded("v", split, 0)
        for kind in kinds:
            for _ in range(20):
                value = make_value(rng, split, kind)
                if kind.startswith("pool:"):
                    assert value in wide_pool(kind[5:], split)
                json.dumps(value)
    for row in table("parameters")["parameter"]:
        assert row["names"] and row["descriptions"]
        if row["value"] == "bool":
            assert row["phrases"] and row["phrases_false"]
        else:
            assert all("{value}" in phrase for phrase in row["phrases"])
    assert len(entries("tool_objects")) > 150


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same(kind: str) -> None:
    assert MAKER.generate(seeded("t", "train", 1), kind=kind) == MAKER.generate(seeded("t", "train", 1), kind=kind)
