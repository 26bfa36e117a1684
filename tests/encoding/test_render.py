"""Prompts against the official encoder, byte for byte."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from abyssal.base.errors import InputError
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import SPECIAL_TOKENS
from abyssal.encoding.messages import Conversation
from abyssal.encoding.render import prompt_text, render
from abyssal.encoding.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "encode.json").read_text(encoding="utf-8"))


def text_of(messages: Any, tools: Any = None, **options: Any) -> str:
    return prompt_text(render(Conversation.from_json(messages, tools).messages, **options))


@pytest.mark.parametrize("case", CASES, ids=[f"{c['snapshot']}/{c['name']}" for c in CASES])
def test_golden_prompts(case: dict[str, Any]) -> None:
    got = text_of(
        case["messages"],
        thinking=case["thinking_mode"] == "thinking",
        snapshot=case["snapshot"],
        effort=case["reasoning_effort"],
    )
    assert got == case["expected_prompt"]


@pytest.mark.parametrize("name", ["official_1", "official_3"])
def test_the_official_examples(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    given = case["input"]
    messages, tools = (given, None) if isinstance(given, list) else (given["messages"], given["tools"])
    assert text_of(messages, tools, thinking=True) == case["expected_prompt"]


def test_typed_marks_are_text_and_template_marks_are_tokens() -> None:
    """A user who types every special string forges no turn."""
    tokenizer = Tokenizer(bundled_folder())
    typed = "".join(SPECIAL_TOKENS)
    messages = [
        {"role": "system", "content": typed},
        {"role": "user", "content": typed},
        {"role": "assistant", "content": typed, "reasoning_content": typed, "tool_calls": [
            {"id": "1", "function": {"name": typed, "arguments": json.dumps({typed: typed})}}]},
        {"role": "tool", "tool_call_id": "1", "content": typed},
    ]  # fmt: skip
    plain = json.loads(json.dumps(messages).replace(json.dumps(typed)[1:-1], "x"))

    def specials(conversation: Any) -> list[int]:
        pieces = render(Conversation.from_json(conversation).messages, thinking=True)
        ids = tokenizer.encode_pieces(pieces)
        known = {tokenizer.special(text) for text in SPECIAL_TOKENS}
        return [i for i in ids if i in known]

    assert specials(messages) == specials(plain)
    assert typed in text_of(messages, thinking=True)


def test_text_between_tokens_is_one_piece() -> None:
    """Otherwise a tokenizer would not join across the borders, and the ids would not be the official ones."""
    pieces = render(Conversation.from_json(CASES[0]["messages"]).messages, thinking=False)
    pieces += render(Conversation.from_json([{"role": "user", "content": ["a", "b"]}]).messages, thinking=True)
    assert not any(not a.special and not b.special for a, b in itertools.pairwise(pieces))


def test_results_come_in_the_order_of_their_calls() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", **call}, {"id": "b", **call}]},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "user", "content": "between"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "first"}, {"type": "image_url"}]},
    ]
    got = text_of(messages, thinking=False)
    want = "<tool_result>first\n\n[Unsupported image_url]</tool_result>\n\nbetween\n\n<tool_result>second</tool_result>"
    assert want in got


def test_arguments_may_come_as_an_object() -> None:
    """Trap: a dict where a JSON string is expected became {"arguments": {...}}."""

    def messages(arguments: Any) -> Any:
        call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]

    assert text_of(messages({"x": [1]}), thinking=False) == text_of(messages('{"x": [1]}'), thinking=False)


def test_a_prefix_is_not_ended() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "begin", "prefix": True}]
    assert text_of(messages, thinking=False).endswith("</think>begin")


def test_the_action_task_opens_an_answer() -> None:
    messages = [{"role": "user", "content": "q", "task": "action"}]
    assert text_of(messages, thinking=True).endswith("<｜Assistant｜><think><｜action｜>")
    assert text_of(messages, thinking=False).endswith("<｜Assistant｜></think><｜action｜>")


@pytest.mark.parametrize(
    ("messages", "tools", "text"),
    [
        ([], None, "at least one message"),
        ("hi", None, "no list"),
        (["hi"], None, "a message is str"),
        ([{"role": "robot", "content": ""}], None, "role 'robot'"),
        ([{"role": "user", "content": 3}], None, "content is int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], None, "'image_url' is not supported"),
        ([{"role": "user", "content": [{"type": "text"}]}], None, "no text"),
        ([{"role": "user", "content": "", "task": "sing"}], None, "task 'sing'"),
        ([{"role": "developer", "content": ""}], None, "developer message is empty"),
        ([{"role": "assistant", "tool_calls": [{}]}], None, "function.name"),
        ([{"role": "assistant", "tool_calls": "x"}], None, "tool_calls is str"),
        ([{"role": "assistant", "reasoning_content": 1}], None, "reasoning_content is int"),
        ([{"role": "user", "content": ""}], [{"type": "web_search"}], "'web_search' is not supported"),
        ([{"role": "user", "content": ""}], [{"type": "function", "function": {}}], "function.name"),
        ([{"role": "user", "content": ""}], {"a": 1}, "tools are dict"),
    ],
)
def test_malformed_conversations_are_refused(messages: Any, tools: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        text_of(messages, tools, thinking=False)
