"""Calls and JSON that the real engine is bound to: the bundled model cannot do them, so the grammar must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from abyssal.chat.local import LocalCompleter
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import DSML, EOS
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.grammar import GrammarCompiler
from abyssal.engine.prefix_cache import PrefixCache
from tests.server.serving import serving

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "maxLength": 20},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["place", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"numbers": {"type": "array", "items": {"type": "number"}, "maxItems": 3}},
                "required": ["numbers"],
            },
        },
    },
]
QUESTION: Any = [{"role": "user", "content": "hi"}]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def api() -> Iterator[openai.OpenAI]:
    model = load_model(bundled_folder()).requires_grad_(False)
    tokenizer = Tokenizer(bundled_folder())
    path, size, end = bundled_folder() / "tokenizer.json", model.config.vocab_size, tokenizer.special(EOS)
    engine = Engine(
        model,
        budget=1 << 29,
        slots=16,
        prefix=lambda memory: PrefixCache(memory, "test"),
        grammars=lambda: GrammarCompiler(path, size, end),
        token_bytes=tokenizer.token_bytes,
    )
    completer = LocalCompleter(engine, tokenizer, "nano")
    with serving(completer) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made
    completer.close()


def check_calls(message: Any) -> list[str]:
    """Names of the calls, whose arguments fit their schemas."""
    names = []
    for call in message.tool_calls or []:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        names.append(call.function.name)
    return names


def ask(api: openai.OpenAI, seed: int, thinking: int = 0, **more: Any) -> Any:
    """An answer and its headers; `thinking` is a budget, 0 for none."""
    extra = {"thinking": {"type": "enabled", "budget_tokens": thinking} if thinking else {"type": "disabled"}}
    raw = api.chat.completions.with_raw_response.create(
        model="nano", messages=QUESTION, seed=seed, max_tokens=400, extra_body=extra, **more
    )
    return raw.parse().choices[0], raw.headers


@pytest.mark.parametrize("thinking", [0, 12])
@pytest.mark.parametrize("seed", range(2))
def test_required_calls_are_made_and_fit_their_schema(api: openai.OpenAI, seed: int, thinking: int) -> None:
    choice, headers = ask(api, seed, thinking, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    if choice.finish_reason == "tool_calls":
        assert len(check_calls(choice.message)) == 1
        repairs = headers.get("x-abyssal-repaired", "")
        assert not repairs.replace("leaked_token", "").strip(", "), repairs  # of the free thinking alone
    else:  # a string or number of hundreds of tokens
        assert choice.finish_reason == "length" and not choice.message.tool_calls
    assert DSML not in (choice.message.content or "")
    if thinking:
        assert choice.message.reasoning_content is not None


@pytest.mark.parametrize("seed", range(2))
def test_a_named_call_is_made(api: openai.OpenAI, seed: int) -> None:
    choice, _ = ask(
        api, seed, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
    )  # fmt: skip
    assert choice.finish_reason == "tool_calls"
    assert check_calls(choice.message) == ["get_weather"] and not choice.message.content


@pytest.mark.parametrize("thinking", [0, 12])
def test_json_behind_the_thinking(api: openai.OpenAI, thinking: int) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for seed in range(2):
        choice, _ = ask(api, seed, thinking, response_format=form)
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    closing = Tokenizer(bundled_folder()).encode('"}')
    ends: dict[str, Any] = {"logit_bias": {str(token): 6 for token in closing}}  # the model itself hardly ever closes
    whole = 0
    for seed in range(3):
        choice, _ = ask(api, seed, thinking, response_format={"type": "json_object"}, **ends)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
            whole += 1
    assert whole, "all objects were cut by length"


def test_no_call_where_none_may_be_made(api: openai.OpenAI) -> None:
    for seed in range(2):
        choice, _ = ask(api, seed, tools=TOOLS, tool_choice="none")
        assert not choice.message.tool_calls and DSML not in (choice.message.content or "")


def test_schemas_that_cannot_be_enforced_are_refused_by_name(api: openai.OpenAI) -> None:
    bad = {"type": "object", "properties": {"x": {"type": "nonsense"}}}
    for more in (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": bad, "strict": True}}],
         "tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": bad, "strict": True}}},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "unknown"}}},
        {"tool_choice": "required"},
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            ask(api, 0, **more)
        assert caught.value.body["message"]  # type: ignore[index]
