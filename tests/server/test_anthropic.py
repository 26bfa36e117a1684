"""Anthropic Messages through the real `anthropic` client."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from abyssal.encoding.literals import DSML
from abyssal.server.anthropic import asked
from abyssal.server.service import Service
from abyssal.server.settings import Settings, keys
from tests.server.serving import Scripted, script, serving

WEATHER: Any = {
    "name": "get_weather",
    "description": "Looks out of the window.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                     "required": ["city"]},
}  # fmt: skip
QUESTION: Any = [{"role": "user", "content": "hi"}]
OFF: Any = {"type": "disabled"}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def client(url: str, key: str | None = "none", token: str | None = None) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, auth_token=token, max_retries=0)


def ask(url: str, messages: Any = QUESTION, **fields: Any) -> Message:
    """An answer that has all that the client's own types require."""
    fields = {"model": "claude-sonnet-5", "max_tokens": 1000, **fields}
    answer = client(url).messages.create(messages=messages, **fields)
    return Message.model_validate(answer.to_dict())


def streamed(url: str, messages: Any = QUESTION, **fields: Any) -> list[Any]:
    """The events of a stream, each checked against the client's own types."""
    fields = {"model": "claude-sonnet-5", "max_tokens": 1000, **fields}
    with client(url).messages.create(messages=messages, stream=True, **fields) as stream:
        return [EVENT.validate_python(event.to_dict()) for event in stream]


def seen(message: Message) -> list[tuple[str, Any]]:
    """Blocks without what is random."""
    shown: list[tuple[str, Any]] = []
    for block in message.content:
        if block.type == "thinking":
            shown.append(("thinking", block.thinking))
        elif block.type == "text":
            shown.append(("text", block.text))
        elif block.type == "tool_use":
            shown.append((block.name, block.input))
    return shown


def test_an_answer_with_thinking(url: str, scripted: Scripted) -> None:
    answer = ask(url)
    assert seen(answer) == [("thinking", "I look it up."), ("text", "Hello, world! STOP here.")]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    prompt, usage = len(scripted.prompts[-1]), answer.usage
    assert usage.cache_read_input_tokens == prompt // 2 and usage.input_tokens == prompt - prompt // 2
    assert usage.output_tokens == len("I look it up.</think>Hello, world! STOP here.") + 1
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == len("I look it up.</think>")


@pytest.mark.parametrize("route", ["", "/anthropic"])
def test_both_routes(url: str, route: str) -> None:
    assert seen(ask(url + route, thinking=OFF)) == [("text", "Hello, world! STOP here.")]
    count = client(url + route).messages.count_tokens(model="nano", messages=QUESTION)
    assert count.input_tokens == ask(url).usage.input_tokens + (ask(url).usage.cache_read_input_tokens or 0)


def test_the_events_of_a_stream(url: str) -> None:
    events = streamed(url)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [event for event in events if event.type.startswith("content_block")]
    assert [event.index for event in blocks] == sorted(event.index for event in blocks)
    starts = [event.content_block for event in blocks if event.type == "content_block_start"]
    assert [(block.type, getattr(block, block.type)) for block in starts] == [("thinking", ""), ("text", "")]
    assert [event.index for event in blocks if event.type == "content_block_stop"] == [0, 1]
    deltas = [event.delta.type for event in blocks if event.type == "content_block_delta"]
    signed = deltas.index("signature_delta")
    assert set(deltas[:signed]) == {"thinking_delta"} and set(deltas[signed + 1 :]) == {"text_delta"}
    start, end = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None and end.delta.stop_reason == "end_turn"
    assert start.usage.input_tokens == end.usage.input_tokens
    assert start.usage.cache_read_input_tokens == end.usage.cache_read_input_tokens > 0
    whole = ask(url)
    assert end.usage.output_tokens == whole.usage.output_tokens and end.usage.input_tokens == whole.usage.input_tokens


def test_a_stream_that_the_client_puts_together_is_the_whole_answer(url: str) -> None:
    for fields in ({}, {"tools": [WEATHER]}, {"stop_sequences": ["STOP"]}):
        whole = ask(url, **fields)
        with client(url).messages.stream(model="nano", max_tokens=1000, messages=QUESTION, **fields) as stream:  # type: ignore[arg-type]
            put = Message.model_validate(stream.get_final_message().to_dict())
        assert seen(put) == seen(whole) and put.usage == whole.usage
        assert (put.stop_reason, put.stop_sequence) == (whole.stop_reason, whole.stop_sequence)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_turn_keeps_its_thinking(strict: bool, stream: bool) -> None:
    scripted = Scripted(script)
    with serving(scripted, Settings(strict=strict)) as url:
        messages: list[Any] = [{"role": "user", "content": "weather?"}]
        if stream:
            fields: Any = {"model": "nano", "max_tokens": 999, "messages": messages, "tools": [WEATHER]}
            with client(url).messages.stream(**fields) as events:
                answer: Message = events.get_final_message()
        else:
            answer = ask(url, messages, tools=[WEATHER])
        arguments = {"city": 'Oslo "N"', "days": 2}
        assert seen(answer) == [("thinking", "I look it up."), ("text", "Let me see."), ("get_weather", arguments)]
        assert answer.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": answer.content[-1].id,  # type: ignore[union-attr]
                  "content": [{"type": "text", "text": "-3 C"}]}  # fmt: skip
        second = ask(url, [*messages, answer.to_param(), {"role": "user", "content": [result]}], tools=[WEATHER])
        assert seen(second)[-1] == ("text", "It is -3 C.")
        prompt = scripted.prompts[-1]
        assert f"<think>I look it up.</think>Let me see.\n\n<{DSML}tool_calls>" in prompt
        assert f'name="city" string="true">Oslo "N"</{DSML}parameter>' in prompt


def test_call_arguments_come_in_pieces_that_make_up_json() -> None:
    city = "x" * 3000
    call = (
        f'</think>\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
        f'<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    with serving(Scripted(lambda _: call)) as url:
        events = streamed(url, tools=[WEATHER], max_tokens=9999)
    pieces = [e.delta.partial_json for e in events if e.type == "content_block_delta" and e.index == 1]
    assert len(pieces) > 3 and json.loads("".join(pieces)) == {"city": city}


def test_empty_thinking_is_a_block_so_that_it_can_come_back() -> None:
    with serving(Scripted(lambda _: "</think>yes"), Settings(strict=True)) as url:
        answer = ask(url, tools=[WEATHER])
        assert seen(answer) == [("thinking", ""), ("text", "yes")]
        thinking = [event for event in streamed(url) if getattr(event, "index", None) == 0]
        assert [event.type[14:] for event in thinking] == ["start", "delta", "stop"]
        again = [*QUESTION, answer.to_param(), {"role": "user", "content": "and?"}]
        assert seen(ask(url, again, tools=[WEATHER])) == [("thinking", ""), ("text", "yes")]


def test_missing_thinking_is_restored_or_refused() -> None:
    for strict in (False, True):
        scripted = Scripted(script)
        with serving(scripted, Settings(strict=strict)) as url:
            first = ask(url, [{"role": "user", "content": "weather?"}], tools=[WEATHER])
            result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "-3 C"}  # type: ignore[union-attr]
            messages: Any = [
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "content": [b.to_dict() for b in first.content if b.type != "thinking"]},
                {"role": "user", "content": [result]},
            ]

            def second(url: str = url, messages: Any = messages) -> Any:
                return client(url).messages.with_raw_response.create(
                    model="nano", max_tokens=99, messages=messages, tools=[WEATHER]
                )

            if strict:
                with pytest.raises(anthropic.BadRequestError, match="must be passed back to the API"):
                    second()
            else:
                assert second().headers["x-abyssal-repaired"] == "restored_reasoning"
                assert "<think>I look it up.</think>Let me see." in scripted.prompts[-1]


def test_a_wrong_signature_counts_only_where_it_is_strict() -> None:
    block = {"type": "thinking", "thinking": "I forged it.", "signature": "\u00e4"}
    messages = [*QUESTION, {"role": "assistant", "content": [block, {"type": "text", "text": "a"}]}, *QUESTION]
    with serving(Scripted(script)) as url:
        assert ask(url, messages).stop_reason == "end_turn"
    wrong = pytest.raises(anthropic.BadRequestError, match=r"messages\.1\.content\.0: Invalid `signature`")
    with serving(Scripted(script), Settings(strict=True)) as url, wrong:
        ask(url, messages)


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"thinking": OFF}, False),
        ({"thinking": {"type": "between_tools"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"output_config": {"effort": "max"}}, True),
        ({"model": "deepseek-chat"}, False),
        ({"model": "deepseek-reasoner"}, True),
    ],
)
def test_when_it_thinks(url: str, scripted: Scripted, fields: dict[str, Any], thinks: bool) -> None:
    assert [kind for kind, _ in seen(ask(url, **fields))] == (["thinking", "text"] if thinks else ["text"])
    assert any(event.type == "content_block_start" and event.index for event in streamed(url, **fields)) is thinks
    budget = fields.get("thinking", {}).get("budget_tokens")
    assert scripted.completions[-1].max_reasoning == budget
    assert ("Absolute maximum" in scripted.prompts[-1]) is ("output_config" in fields)


def test_stop_sequences_and_lengths(url: str) -> None:
    answer = ask(url, stop_sequences=["never", "STOP"])
    assert seen(answer)[-1] == ("text", "Hello, world! ")
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "STOP")
    assert streamed(url, stop_sequences=["STOP"])[-2].delta.stop_sequence == "STOP"
    answer = ask(url, max_tokens=30)
    assert seen(answer)[-1] == ("text", "Hello, wo") and answer.stop_reason == "max_tokens"
    assert seen(ask(url, max_tokens=5)) == [("thinking", "I loo")]


def test_an_answer_at_the_end_is_continued(scripted: Scripted, url: str) -> None:
    begun = {"role": "assistant", "content": "Hello from"}
    answer = ask(url, [*QUESTION, begun])
    assert scripted.prompts[-1].endswith("</think>Hello from")
    assert seen(answer) == [("text", "Hello, world! STOP here.")]
    ask(url, [*QUESTION, {"role": "assistant", "content": []}])
    assert scripted.prompts[-1].endswith("<think>")


def test_system_texts_keep_their_place(scripted: Scripted, url: str) -> None:
    blocks: Any = [{"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
                   {"type": "text", "text": "Two."}]  # fmt: skip
    messages = [{"role": "system", "content": "Three."}, *QUESTION, {"role": "system", "content": "Remember."}]
    ask(url, messages, system=blocks, thinking=OFF)
    prompt = scripted.prompts[-1]
    assert prompt.endswith("One.\n\nTwo.\n\nThree.<｜User｜>hi\n\nRemember.<｜Assistant｜></think>")
    ask(url, messages[1:], tools=[WEATHER])
    assert scripted.prompts[-1].index("## Tools") < scripted.prompts[-1].index("<｜User｜>")


def test_what_clients_really_send(scripted: Scripted, url: str) -> None:
    """Empty and null contents, results in another order, thinking nobody asked for, split answers, unknown keys."""
    calls = [{"type": "tool_use", "id": i, "name": "get_weather", "input": given}
             for i, given in (("a", {"city": "A"}), ("b", '{"city": "B"}'), ("c", None))]  # fmt: skip
    results = [
        {"type": "tool_result", "tool_use_id": "b", "content": "rain", "is_error": True},
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sun"}, {"type": "image"}]},
        {"type": "tool_result", "tool_use_id": "c"},
        {"type": "text", "text": "so?"},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    messages = [
        {"role": "user", "content": []},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, thought]},
        {"role": "assistant", "content": calls},
        {"role": "user", "content": results},
    ]
    extra = {"dsh_session_log": "secret", "mcp_servers": [], "context_management": {}, "metadata": {"user_id": "me"}}
    ask(url, messages, tools=[WEATHER], thinking=OFF, extra_body=extra)
    prompt = scripted.prompts[-1]
    assert "secret" not in prompt and "hm" not in prompt
    assert prompt.count(f'<{DSML}invoke name="get_weather">') == 3 and prompt.count("string=\"true\">B<") == 1
    assert (
        "<tool_result>sun\n\n[Unsupported image]</tool_result>\n\n<tool_result>Error: rain</tool_result>\n\n"
        "<tool_result></tool_result>\n\nso?" in prompt
    )
    ask(url, messages, tools=[WEATHER])
    assert "<think>hm</think>\n\n" in scripted.prompts[-1]


@pytest.mark.parametrize(
    ("choice", "mode", "name", "parallel"),
    [
        (None, "auto", None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", None, False),
        ({"type": "none"}, "none", None, True),
        ({"type": "any"}, "required", None, True),
        ({"type": "tool", "name": "get_weather"}, "required", "get_weather", True),
    ],
)
def test_what_tool_choices_mean(choice: Any, mode: str, name: str | None, parallel: bool) -> None:
    service = Service(Scripted(script), Settings())
    body = {"model": "nano", "messages": QUESTION, "max_tokens": 9, "tools": [WEATHER], "tool_choice": choice}
    request = asked(body, service).request
    assert (request.tool_mode, request.tool_name, request.parallel_calls) == (mode, name, parallel)
    (tool,) = request.tools
    assert list(tool) == ["name", "description", "parameters"] and tool["parameters"] == WEATHER["input_schema"]


def test_tools_that_are_not_to_be_used_are_not_called(url: str) -> None:
    answer = ask(url, tools=[WEATHER], tool_choice={"type": "none"})
    assert answer.stop_reason == "end_turn" and [block.type for block in answer.content] == ["thinking", "text"]
    assert DSML not in str(seen(answer))


def test_the_schema_is_shown(url: str, scripted: Scripted) -> None:
    class City(BaseModel):
        name: str

    with serving(Scripted(lambda _: '</think>{"name": "Oslo"}')) as cities:
        parsed = client(cities).messages.parse(model="nano", max_tokens=99, messages=QUESTION, output_format=City)
        assert parsed.parsed_output == City(name="Oslo")
    ask(url, output_config={"format": {"type": "json_schema", "schema": City.model_json_schema()}})
    assert "## Response Format:" in scripted.prompts[-1] and '"title": "City"' in scripted.prompts[-1]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "gpt-5"}, anthropic.NotFoundError, "gpt-5"),
        ({"max_tokens": None}, anthropic.BadRequestError, "max_tokens"),
        ({"max_tokens": 0}, anthropic.UnprocessableEntityError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "message"),
        ({"messages": None}, anthropic.BadRequestError, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, anthropic.BadRequestError, "user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, anthropic.BadRequestError, "user"),
        ({"messages": [{"role": "robot", "content": ""}]}, anthropic.BadRequestError, "robot"),
        ({"messages": [{"role": "user", "content": 3}]}, anthropic.BadRequestError, "messages.0"),
        ({"messages": [{"role": "user", "content": [3]}]}, anthropic.BadRequestError, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, anthropic.BadRequestError, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "odd"}]}]}, anthropic.BadRequestError, "odd"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
         anthropic.BadRequestError, "tool_result"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [{"type": "tool_use"}]}]},
         anthropic.BadRequestError, "name"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, anthropic.BadRequestError, "web_search_20250305"),
        ({"tools": [{"input_schema": {}}]}, anthropic.BadRequestError, "name"),
        ({"tool_choice": {"type": "odd"}}, anthropic.UnprocessableEntityError, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, anthropic.BadRequestError, "name"),
        ({"thinking": {"type": "odd"}}, anthropic.UnprocessableEntityError, "thinking"),
        ({"output_config": {"effort": "huge"}}, anthropic.UnprocessableEntityError, "huge"),
        ({"output_config": {"format": {"type": "json_schema"}}}, anthropic.BadRequestError, "schema"),
        ({"stop_sequences": ["x"] * 17}, anthropic.UnprocessableEntityError, "stop_sequences"),
        ({"temperature": -1}, anthropic.UnprocessableEntityError, "temperature"),
    ],
)  # fmt: skip
def test_bad_requests(url: str, change: Any, error: type[anthropic.APIStatusError], says: str) -> None:
    body = {"model": "nano", "messages": QUESTION, "max_tokens": 99, **change}
    body = {key: value for key, value in body.items() if value is not None}
    for stream in (False, True):
        with pytest.raises(error, match=says) as caught:
            client(url).post("/v1/messages", body={**body, "stream": stream}, cast_to=object)
        found: Any = caught.value.body
        kind = "not_found_error" if error is anthropic.NotFoundError else "invalid_request_error"
        assert found["type"] == "error" and found["error"]["type"] == kind == caught.value.type
        assert found["request_id"].startswith("req_")


def test_a_prompt_beyond_the_context_names_both_numbers() -> None:
    with serving(Scripted(script, context=50)) as url:
        for call in (ask, streamed):
            with pytest.raises(anthropic.BadRequestError, match="the context holds 50"):
                call(url, [{"role": "user", "content": "x" * 90}])


def test_counted_tokens_are_those_of_the_prompt(url: str, scripted: Scripted) -> None:
    fields: Any = {"messages": QUESTION, "system": "Be kind.", "tools": [WEATHER], "model": "nano"}
    counted = client(url).messages.count_tokens(**fields)
    ask(url, **fields)
    assert MessageTokensCount.model_validate(counted.to_dict()).input_tokens == len(scripted.prompts[-1])
    assert client(url).messages.count_tokens(**fields, thinking=OFF).input_tokens > 100
    with pytest.raises(anthropic.NotFoundError):
        client(url).messages.count_tokens(**{**fields, "model": "gpt-5"})


def test_keys_and_models() -> None:
    with serving(Scripted(script), Settings(api_keys=keys(["one"]))) as url:
        assert {model.id for model in client(url, "one").models.list()} >= {"nano", "deepseek-v4-pro"}
        assert client(url, "one").models.retrieve("nano").display_name == "nano"
        bearer = client(url, None, "one")
        assert bearer.messages.create(model="nano", max_tokens=9, messages=QUESTION).role == "assistant"
        with pytest.raises(anthropic.AuthenticationError) as caught:
            ask_with = client(url, "two").messages.create
            ask_with(model="nano", max_tokens=9, messages=QUESTION)
        assert caught.value.type == "authentication_error"


def test_legacy_names(url: str) -> None:
    answer = client(url).messages.with_raw_response.create(model="deepseek-chat", max_tokens=99, messages=QUESTION)
    assert answer.headers["deprecation"] == "true" and answer.headers["x-abyssal-model"] == "nano"


def test_too_many_at_once_are_told_to_come_back() -> None:
    with serving(Scripted(lambda _: "</think>" + "x" * 1000, pause=0.01), Settings(requests=1)) as url:
        stream = client(url).messages.create(model="nano", max_tokens=9999, messages=QUESTION, stream=True)
        next(iter(stream))
        with pytest.raises(anthropic.RateLimitError) as caught:
            ask(url)
        assert int(caught.value.response.headers["retry-after"]) > 0 and caught.value.type == "rate_limit_error"
        stream.close()


def test_an_interruption_is_an_error_event() -> None:
    scripted = Scripted(lambda _: "</think>" + "x" * 1000, pause=0.01)
    with serving(scripted) as url:
        stream = client(url).messages.create(model="nano", max_tokens=9999, messages=QUESTION, stream=True)
        events = iter(stream)
        next(events)
        scripted.interrupt()
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(events)
        assert caught.value.type == "overloaded_error"
        with pytest.raises(anthropic.ServiceUnavailableError) as status:
            ask(url)
        assert status.value.type == "overloaded_error"


def test_pings_while_nothing_comes() -> None:
    with serving(Scripted(lambda _: "</think>abc", pause=0.1), Settings(keep_alive_s=0.02)) as url:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
        body = {"model": "nano", "max_tokens": 99, "messages": QUESTION, "stream": True}
        connection.request("POST", "/v1/messages", json.dumps(body))
        events = connection.getresponse().read().decode().strip().split("\n\n")
        connection.close()
    assert events[0].startswith(": "), "a comment, as soon as the request is accepted"
    assert 'event: ping\ndata: {"type":"ping"}' in events[1:]
    for event in events[1:]:
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


def test_when_the_client_leaves_the_work_ends() -> None:
    scripted = Scripted(lambda _: "</think>" + "x" * 100_000, pause=0.01)
    with serving(scripted) as url:
        stream = client(url).messages.create(model="nano", max_tokens=20_000, messages=QUESTION, stream=True)
        next(iter(stream))
        assert scripted.active == 1
        stream.close()
        end = time.monotonic() + 5
        while scripted.active and time.monotonic() < end:
            time.sleep(0.02)
        assert scripted.active == 0
