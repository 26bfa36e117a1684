"""OpenAI Responses through the real `openai` client."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from abyssal.encoding.literals import DSML
from abyssal.server.errors import ApiError
from abyssal.server.responses import Memory, Run, asked
from abyssal.server.service import Service
from abyssal.server.settings import Settings, keys
from tests.server.serving import Scripted, script, serving

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Looks out of the window.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                   "required": ["city"]},
    "strict": None,
}  # fmt: skip
NO_THINKING: Any = {"effort": "none"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def ask(url: str, input: Any = "hi", **fields: Any) -> Response:  # noqa: A002
    """An answer that has all that the client's own types require."""
    answer = client(url).responses.create(**{"model": "nano", "input": input, **fields})
    return Response.model_validate(answer.to_dict())


def streamed(url: str, input: Any = "hi", **fields: Any) -> list[Any]:  # noqa: A002
    """The events of a stream, each checked against the client's own types."""
    with client(url).responses.create(**{"model": "nano", "input": input, "stream": True, **fields}) as stream:
        events = [EVENT.validate_python(event.to_dict()) for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def seen(response: Response) -> list[tuple[str, Any]]:
    """Output items without what is random."""
    shown: list[tuple[str, Any]] = []
    for item in response.output:
        if item.type == "reasoning":
            assert item.content is not None
            shown.append(("reasoning", "".join(part.text for part in item.content)))
        elif item.type == "message":
            shown.append(("text", "".join(part.text for part in item.content if part.type == "output_text")))
        elif item.type == "function_call":
            shown.append((item.name, json.loads(item.arguments)))
    return shown


def plain(response: Response) -> list[Any]:
    """Output items as a client sends them back."""
    return [item.to_dict() for item in response.output]


def test_an_answer_with_reasoning(url: str, scripted: Scripted) -> None:
    answer = ask(url, metadata={"a": "b"}, temperature=0.5)
    assert seen(answer) == [("reasoning", "I look it up."), ("text", "Hello, world! STOP here.")]
    assert answer.output_text == "Hello, world! STOP here." and answer.status == "completed"
    assert {item.status for item in answer.output} == {"completed"}  # type: ignore[union-attr]
    assert answer.metadata == {"a": "b"} and answer.temperature == 0.5 and answer.error is None
    assert answer.reasoning is not None and answer.reasoning.effort == "high"
    prompt, usage = len(scripted.prompts[-1]), answer.usage
    assert usage is not None and usage.input_tokens == prompt
    assert usage.input_tokens_details.cached_tokens == prompt // 2
    assert usage.output_tokens_details.reasoning_tokens == len("I look it up.</think>")
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize(
    ("fields", "thinks", "effort"),
    [
        ({"reasoning": {"effort": "none"}}, False, "none"),
        ({"reasoning": {"effort": "minimal"}}, True, "low"),
        ({"reasoning": {"effort": "max"}}, True, "max"),
        ({"reasoning": {}}, True, "high"),
        ({"model": "deepseek-chat"}, False, "none"),
        ({"model": "deepseek-chat", "reasoning": {"effort": "high"}}, True, "high"),
    ],
)
def test_when_it_thinks(url: str, fields: dict[str, Any], thinks: bool, effort: str) -> None:
    answer = ask(url, **fields)
    assert [kind for kind, _ in seen(answer)] == (["reasoning", "text"] if thinks else ["text"])
    assert answer.reasoning is not None and answer.reasoning.effort == effort


def test_the_events_of_a_stream(url: str) -> None:
    events = streamed(url)
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    text = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    assert once == [
        "created", "in_progress", *(kind.format("reasoning_text") for kind in text),
        *(kind.format("output_text") for kind in text), "completed",
    ]  # fmt: skip
    final = events[-1].response
    assert seen(final) == seen(ask(url)) and final.usage == ask(url).usage
    assert {event.response.id for event in (events[0], events[1])} == {final.id}
    for index, item in enumerate(final.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert {event.item_id for event in mine if hasattr(event, "item_id")} == {item.id}
        assert mine[0].item.id == mine[-1].item.id == item.id and mine[-1].item == item
        said = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert [event.text for event in mine if event.type.endswith("_text.done")] == [said] == [item.content[0].text]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_turn_keeps_its_reasoning(strict: bool, stream: bool) -> None:
    scripted = Scripted(script)
    with serving(scripted, Settings(strict=strict)) as url:
        if stream:
            with client(url).responses.stream(model="nano", input="weather?", tools=[WEATHER]) as events:
                answer: Response = events.get_final_response()
            raw = streamed(url, "weather?", tools=[WEATHER])
            (done,) = [event for event in raw if event.type == "response.function_call_arguments.done"]
            pieces = [event.delta for event in raw if event.type == "response.function_call_arguments.delta"]
            assert "".join(pieces) == done.arguments == raw[-1].response.output[-1].arguments
        else:
            answer = ask(url, "weather?", tools=[WEATHER])
        arguments = {"city": 'Oslo "N"', "days": 2}
        assert seen(answer) == [("reasoning", "I look it up."), ("text", "Let me see."), ("get_weather", arguments)]
        output = {"type": "function_call_output", "call_id": answer.output[-1].call_id,  # type: ignore[union-attr]
                  "output": [{"type": "input_text", "text": "-3 C"}]}  # fmt: skip
        second = ask(url, [{"role": "user", "content": "weather?"}, *plain(answer), output], tools=[WEATHER])
        assert second.output_text == "It is -3 C."
        prompt = scripted.prompts[-1]
        assert f"<think>I look it up.</think>Let me see.\n\n<{DSML}tool_calls>" in prompt
        assert '{"name": "get_weather", "description": "Looks out of the window.", "parameters": ' in prompt
        third = ask(url, [output], previous_response_id=answer.id, tools=[WEATHER])
        assert third.output_text == "It is -3 C." and third.previous_response_id == answer.id
        assert scripted.prompts[-1] == prompt


def test_missing_reasoning_is_restored_or_refused() -> None:
    for strict in (False, True):
        scripted = Scripted(script)
        with serving(scripted, Settings(strict=strict)) as url:
            first = ask(url, "weather?", tools=[WEATHER])
            items: list[Any] = [{"role": "user", "content": "weather?"}, *plain(first)[1:]]
            call = first.output[-1].call_id  # type: ignore[union-attr]
            items.append({"type": "function_call_output", "call_id": call, "output": "-3 C"})
            items.insert(1, {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "?"})

            def second(url: str = url, items: Any = items) -> Any:
                return client(url).responses.with_raw_response.create(model="nano", input=items, tools=[WEATHER])

            if strict:
                with pytest.raises(openai.BadRequestError, match="must be passed back to the API"):
                    second()
            else:
                assert second().headers["x-abyssal-repaired"] == "restored_reasoning"
                assert "<think>I look it up.</think>Let me see." in scripted.prompts[-1]


def test_previous_responses_are_remembered_for_their_caller() -> None:
    scripted = Scripted(script)
    with serving(scripted, Settings(api_keys=keys(["one", "two"]))) as url:
        one = client(url, "one").responses
        first = one.create(model="nano", input="hi", instructions="Old.", reasoning=NO_THINKING)
        fields: Any = {"model": "nano", "instructions": "New.", "reasoning": NO_THINKING}
        second = one.create(input="and?", previous_response_id=first.id, **fields)
        assert scripted.prompts[-1].endswith(
            "New.<｜User｜>hi<｜Assistant｜></think>Hello, world! STOP here.<｜end▁of▁sentence｜>"
            "<｜User｜>and?<｜Assistant｜></think>"
        )
        for event in one.create(input="so?", previous_response_id=second.id, stream=True, **fields):
            last = event
        one.create(input="ok", previous_response_id=last.response.id, **fields)  # type: ignore[union-attr]
        assert scripted.prompts[-1].count("<｜User｜>") == 4
        with pytest.raises(openai.BadRequestError) as caught:
            client(url, "two").responses.create(input="and?", previous_response_id=first.id, **fields)
        assert caught.value.code == "previous_response_not_found" and caught.value.param == "previous_response_id"
        unkept = one.create(input="hi", store=False, **fields)
        with pytest.raises(openai.BadRequestError, match=unkept.id):
            one.create(input="and?", previous_response_id=unkept.id, **fields)


def test_the_memory_is_bounded_and_forgets_what_is_longest_unused() -> None:
    memory = Memory(count=2)
    for name in "ab":
        memory.keep("me", name, ({"n": name},))
    memory.recall("me", "a")
    memory.keep("me", "c", ())
    assert memory.recall("me", "a") == ({"n": "a"},)
    for caller, name in (("me", "b"), ("you", "a")):
        with pytest.raises(ApiError):
            memory.recall(caller, name)
    small = Memory(characters=100)
    for name in "abc":
        small.keep("me", name, ({"text": "x" * 30},))
    small.recall("me", "c")
    with pytest.raises(ApiError):
        small.recall("me", "a")
    small.keep("me", "d", ({"text": "x" * 200},))
    with pytest.raises(ApiError):
        small.recall("me", "d")
    small.keep("me", "e", ())
    assert small.recall("me", "e") == ()


def test_items_become_the_turns_that_they_are(url: str, scripted: Scripted) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Dev."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I see."}]},
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "A"}'},
        {"type": "function_call", "call_id": "b", "name": "get_weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "b", "output": "rain"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        {"role": "developer", "content": "Be quick."},
    ]
    ask(url, items, instructions="Ins.", tools=[WEATHER])
    prompt = scripted.prompts[-1]
    assert "<｜begin▁of▁sentence｜>Ins.\n\nDev.\n\n## Tools" in prompt
    assert f"<｜User｜>hi<｜Assistant｜><think>hm</think>I see.\n\n<{DSML}tool_calls>" in prompt
    assert prompt.endswith(
        "<｜User｜><tool_result>sun</tool_result>\n\n<tool_result>rain</tool_result>\n\nBe quick.<｜Assistant｜><think>"
    )


def test_lengths(url: str) -> None:
    for response in (ask(url, max_output_tokens=30), streamed(url, max_output_tokens=30)[-1].response):
        assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
        assert seen(response)[-1] == ("text", "Hello, wo")
        assert [item.status for item in response.output] == ["completed", "incomplete"]
    assert streamed(url, max_output_tokens=30)[-1].type == "response.incomplete"
    cut = ask(url, max_output_tokens=5)
    assert seen(cut) == [("reasoning", "I loo")] and cut.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_log_probabilities_of_the_text(url: str) -> None:
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "reasoning": NO_THINKING}
    part = ask(url, **fields).output[0].content[0]  # type: ignore[union-attr, index]
    assert "".join(token.token for token in part.logprobs) == "Hello, world! STOP here."  # type: ignore[union-attr]
    assert part.logprobs[0].top_logprobs[0].logprob == -0.5  # type: ignore[union-attr, index]
    events = streamed(url, **fields)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert all("".join(token.token for token in event.logprobs) == event.delta for event in deltas)
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert len(done.logprobs) == len(done.text)
    assert not ask(url).output[-1].content[0].logprobs  # type: ignore[union-attr, index]
    # thinking has none; its end is one token of a real model, which is left out, and many of the script's
    thought = ask(url, **{**fields, "reasoning": None}).output[-1].content[0].logprobs  # type: ignore[union-attr, index]
    assert "".join(token.token for token in thought) == "</think>Hello, world! STOP here."  # type: ignore[union-attr]


def test_log_probabilities_of_texts_around_a_call() -> None:
    call = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
        f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    with serving(Scripted(lambda _: f"one{call}two")) as url:
        answer = ask(url, tools=[WEATHER], reasoning=NO_THINKING, include=["message.output_text.logprobs"])
    first, made, second = answer.output
    assert made.type == "function_call" and json.loads(made.arguments) == {"city": "Oslo"}
    for item, text in ((first, "one"), (second, "two")):
        part = item.content[0]  # type: ignore[union-attr, index]
        said = "".join(token.token for token in part.logprobs)  # type: ignore[union-attr]
        assert part.text == text == said.removeprefix(f"\n</{DSML}tool_calls>")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "mode", "name"),
    [
        (None, "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "get_weather"}, "required", "get_weather"),
    ],
)
def test_what_tool_choices_mean(choice: Any, mode: str, name: str | None) -> None:
    service = Service(Scripted(script), Settings())
    body = {"model": "nano", "input": "hi", "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    run = Run(asked(body, service), service, Memory(), "me")
    request = run.turn.request
    assert (request.tool_mode, request.tool_name, request.parallel_calls) == (mode, name, False)
    told = Response.model_validate(run.response("in_progress"))
    assert (told.tool_choice if name is None else told.tool_choice.name) == (name or mode)  # type: ignore[union-attr]
    assert told.tools[0].name == "get_weather" and not told.parallel_tool_calls  # type: ignore[union-attr]


def test_the_schema_is_shown(url: str, scripted: Scripted) -> None:
    class City(BaseModel):
        name: str

    with serving(Scripted(lambda _: '</think>{"name": "Oslo"}')) as cities:
        parsed = client(cities).responses.parse(model="nano", input="hi", text_format=City)
        assert parsed.output_parsed == City(name="Oslo")
        assert parsed.text is not None and parsed.text.format is not None and parsed.text.format.type == "json_schema"
    form = {"type": "json_schema", "name": "city", "schema": City.model_json_schema()}
    answer = ask(url, text={"format": form})
    assert "## Response Format:" in scripted.prompts[-1] and '"title": "City"' in scripted.prompts[-1]
    assert answer.text is not None and answer.text.format is not None and answer.text.format.name == "city"  # type: ignore
    assert ask(url, text={"format": {"type": "json_object"}}).text.format.type == "json_object"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"input": None}, openai.BadRequestError, "input"),
        ({"input": []}, openai.BadRequestError, None),
        ({"input": [{"role": "robot", "content": ""}]}, openai.BadRequestError, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, openai.BadRequestError, None),
        ({"input": [{"type": "item_reference", "id": "x"}]}, openai.BadRequestError, "input.0"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]},
         openai.BadRequestError, "input"),
        ({"input": [{"role": "user", "content": "x"}, {"type": "reasoning", "content": 3}]},
         openai.BadRequestError, "input"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, openai.BadRequestError, None),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools.0"),
        ({"tools": [WEATHER, {"type": "mcp", "server_label": "x"}]}, openai.BadRequestError, "tools.1"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools.0.name"),
        ({"tool_choice": {"type": "web_search"}}, openai.BadRequestError, "tool_choice"),
        ({"text": {"format": {"type": "odd"}}}, openai.BadRequestError, "text.format"),
        ({"background": True}, openai.BadRequestError, "background"),
        ({"conversation": "c"}, openai.BadRequestError, "conversation"),
        ({"truncation": "auto"}, openai.UnprocessableEntityError, "truncation"),
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature"),
        ({"top_logprobs": 21}, openai.UnprocessableEntityError, "top_logprobs"),
        ({"max_output_tokens": 0}, openai.UnprocessableEntityError, "max_output_tokens"),
        ({"reasoning": {"effort": "huge"}}, openai.UnprocessableEntityError, "reasoning.effort"),
        ({"previous_response_id": "resp_x"}, openai.BadRequestError, "previous_response_id"),
    ],
)  # fmt: skip
def test_bad_requests(url: str, change: Any, error: type[openai.APIStatusError], param: str | None) -> None:
    body = {"model": "nano", "input": "hi", **change}
    body = {key: value for key, value in body.items() if value is not None}
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client(url).post("/responses", body={**body, "stream": stream}, cast_to=object)
        found: Any = caught.value.body
        assert found["param"] == param and found["message"]


def test_known_fields_that_change_nothing_are_accepted(url: str) -> None:
    answer = ask(url, background=False, truncation="disabled", user="me", service_tier="auto", text={"format": {}},
                 include=["reasoning.encrypted_content"], max_tool_calls=3)  # fmt: skip
    assert answer.status == "completed"


def test_a_prompt_beyond_the_context_names_both_numbers() -> None:
    with serving(Scripted(script, context=50)) as url:
        for call in (ask, streamed):
            with pytest.raises(openai.BadRequestError, match="the context holds 50") as caught:
                call(url, "x" * 90)
            assert caught.value.code == "context_length_exceeded"


def test_an_interruption_fails_the_response() -> None:
    scripted = Scripted(lambda _: "</think>" + "x" * 1000, pause=0.01)
    with serving(scripted) as url:
        events: list[Any] = []
        for event in client(url).responses.create(model="nano", input="hi", stream=True):
            events.append(EVENT.validate_python(event.to_dict()))
            scripted.interrupt()
        assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
        assert events[-1].response.error.code == "server_error"
        with pytest.raises(openai.InternalServerError) as caught:
            ask(url)
        assert caught.value.status_code == 503


def test_when_the_client_leaves_the_work_ends() -> None:
    scripted = Scripted(lambda _: "</think>" + "x" * 100_000, pause=0.01)
    with serving(scripted) as url:
        stream = client(url).responses.create(model="nano", input="hi", stream=True)
        next(iter(stream))
        assert scripted.active == 1
        stream.close()
        end = time.monotonic() + 5
        while scripted.active and time.monotonic() < end:
            time.sleep(0.02)
        assert scripted.active == 0
