"""Every example can be rendered for the model and read back, and made again from its number."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from abyssal.base.errors import DataError
from abyssal.encoding.messages import Conversation
from abyssal.encoding.parse import parse
from abyssal.encoding.render import prompt_text, render
from abyssal.train.data.example import Example, read_examples, write_examples
from abyssal.train.data.mixture import DOMAINS, Mixture
from abyssal.train.data.pools import SPLITS, Split


def count(text: str) -> int:
    return len(re.findall(r"[^\W\d]+|\d|[^\w\s]|\n", text))


def text_of(example: Example, until: int) -> str:
    conversation = Conversation.from_json(example.messages[:until], example.tools or None)
    return prompt_text(
        render(
            conversation.messages,
            thinking=example.thinking_mode != "non-think",
            effort="max" if example.thinking_mode == "think-max" else None,
        )
    )


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_turn_is_read_back(domain: str, split: Split) -> None:
    """What the model is to write after a prompt is parsed into the message, without any repair."""
    for example in Mixture(count, {domain: 1}, split).examples(60):
        functions = [tool["function"] for tool in example.tools]
        turns = 0
        for place, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            turns += 1
            prompt, whole = text_of(example, place), text_of(example, place + 1)
            assert whole.startswith(prompt)
            parsed = parse(whole[len(prompt) :], thinking=example.thinking_mode != "non-think", tools=functions or None)
            assert parsed.complete and not parsed.repairs
            assert parsed.content == message["content"]
            assert parsed.reasoning == message.get("reasoning_content", "")
            wanted = [c["function"] for c in message.get("tool_calls", [])]
            assert [c.name for c in parsed.tool_calls] == [c["name"] for c in wanted]
            for got, call in zip(parsed.tool_calls, wanted, strict=True):
                assert json.loads(got.arguments) == json.loads(call["arguments"])
        assert turns and example.messages[-1]["role"] == "assistant"


def test_an_example_is_made_from_its_number_alone() -> None:
    mixture = Mixture(count)
    ahead = [mixture.example(index) for index in range(40)]
    assert [Mixture(count).example(index) for index in (39, 3, 17)] == [ahead[39], ahead[3], ahead[17]]
    assert list(mixture.examples(5, start=10)) == ahead[10:15]
    assert len({example.id for example in ahead}) == 40
    other = [Mixture(count, seed=1).example(index).messages for index in range(40)]
    assert not [1 for a, b in zip(ahead, other, strict=True) if a.messages == b and a.domain != "conversation"]


def test_another_process_makes_the_same() -> None:
    """Whatever its hash seed is: no order of a set may decide anything."""
    script = (
        "import hashlib; from abyssal.train.data.mixture import *; m = Mixture(lambda t: len(t.split()));"
        "print(hashlib.sha256(repr([(m.example(i), m.passage(i)) for i in range(60)]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_shares_follow_the_weights() -> None:
    weights = {"tool_use": 3, "arithmetic": 1}
    made = Counter(example.domain for example in Mixture(count, weights).examples(400))
    assert set(made) == set(weights)
    assert 265 < made["tool_use"] < 335  # four standard deviations about 300


def test_passages() -> None:
    mixture = Mixture(count, {"retrieval": 1, "copying": 1, "tool_use": 9})
    made = [mixture.passage(index) for index in range(40)]
    assert {passage.domain for passage in made} == {"retrieval", "copying"}
    assert all(passage.answers for passage in made)
    with pytest.raises(DataError, match="nothing of retrieval"):
        Mixture(count, {"tool_use": 1}).passage(0)


def test_kinds_narrow_what_is_made() -> None:
    """Each generator keeps to the kinds that are its own, and makes all of them where none is."""
    narrow = Mixture(count, {"retrieval": 1, "copying": 1}, kinds=("key_value", "pairs"))
    made = [narrow.passage(index) for index in range(60)]
    assert {(p.domain, p.meta["kind"]) for p in made} == {("retrieval", "key_value"), ("copying", "pairs")}
    # of conversations that copy, no kind is named
    assert len({example.source for example in narrow.examples(60)}) > 3
    with pytest.raises(DataError, match="the kind riddle"):
        Mixture(count, kinds=("riddle",))


@pytest.mark.parametrize("weights", [{"poems": 1}, {"tool_use": -1}, {"tool_use": 0}, {}])
def test_bad_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DataError):
        Mixture(count, weights)


def test_through_a_file(tmp_path: Path) -> None:
    made = list(Mixture(count).examples(50))
    write_examples(tmp_path / "a.jsonl", made)
    assert list(read_examples(tmp_path / "a.jsonl")) == made


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_conversation_is_in_both_parts(domain: str) -> None:
    """Requests of the held-out part, without greetings and plain facts, never occur in training."""
    asked = {
        split: {
            message["content"]
            for example in Mixture(count, {domain: 1}, split).examples(200)
            if example.source not in ("talk", "fact", "members", "larger", "spell")
            for message in example.messages
            if message["role"] in ("user", "tool") and len(message["content"]) > 60
        }
        for split in SPLITS
    }
    assert not asked["train"] & asked["held_out"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_modes_are_those_that_are_wanted(domain: str) -> None:
    mixture = Mixture(count, {domain: 1}, modes=("think-high",))
    assert {mixture.example(index).thinking_mode for index in range(20)} == {"think-high"}
    with pytest.raises(DataError, match="modes"):
        Mixture(count, {domain: 1}, modes=())
