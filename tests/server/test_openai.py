"""Chat Completions through the real `openai` client and over plain HTTP.

The bundled model calls no tools yet, so most answers are scripted behind `chat.api`; what is tested is the wire.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from abyssal.chat.local import LocalCompleter
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import DSML
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.prefix_cache import PrefixCache
from abyssal.server.settings import Settings, keys
from tests.server.serving import Scripted, script, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                       "required": ["city"]},
    },
}  # fmt: skip


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


QUESTION: Any = [{"role": "user", "content": "hi"}]


def test_an_answer_with_thinking(url: str) -> None:
    answer = client(url).chat.completions.create(model="deepseek-v4-flash", messages=QUESTION)
    (choice,) = answer.choices
    assert choice.message.content == "Hello, world! STOP here." and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "I look it up."  # type: ignore[attr-defined]
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None and usage.completion_tokens_details is not None
    cached = usage.prompt_tokens // 2
    assert usage.prompt_tokens_details.cached_tokens == cached == usage.prompt_cache_hit_tokens  # type: ignore
    assert usage.prompt_cache_miss_tokens == usage.prompt_tokens - cached  # type: ignore[attr-defined]
    assert usage.completion_tokens_details.reasoning_tokens == len("I look it up.</think>")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize(
    "extra",
    [
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ],
)
def test_every_way_to_switch_thinking_off(url: str, extra: dict[str, Any]) -> None:
    answer = client(url).chat.completions.create(model="nano", messages=QUESTION, extra_body=extra)
    assert answer.choices[0].message.content == "Hello, world! STOP here."
    assert not hasattr(answer.choices[0].message, "reasoning_content")


def test_a_stream_has_role_reasoning_content_finish_and_usage(url: str) -> None:
    stream = client(url).chat.completions.create(
        model="nano", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any(c.choices[0].delta.role for c in chunks[1:] if c.choices)
    thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices)
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert (thought, content) == ("I look it up.", "Hello, world! STOP here.")
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens > 0 and all(c.usage is None for c in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_turn_keeps_its_reasoning(stream: bool) -> None:
    scripted = Scripted(script)
    with serving(scripted) as url:
        api = client(url)
        messages: list[Any] = [{"role": "user", "content": "weather?"}]
        if stream:
            chunks = list(api.chat.completions.create(model="nano", messages=messages, tools=[WEATHER], stream=True))  # type: ignore
            parts = [d for c in chunks for d in (c.choices[0].delta.tool_calls or [])]
            call_id, name = parts[0].id, parts[0].function.name
            arguments = "".join(p.function.arguments or "" for p in parts)
            finish = chunks[-1].choices[0].finish_reason
            content = "".join(c.choices[0].delta.content or "" for c in chunks)
        else:
            answer = api.chat.completions.create(model="nano", messages=messages, tools=[WEATHER])  # type: ignore
            (call,) = answer.choices[0].message.tool_calls
            call_id, name, arguments = call.id, call.function.name, call.function.arguments
            finish, content = answer.choices[0].finish_reason, answer.choices[0].message.content
        assert (name, json.loads(arguments)) == ("get_weather", {"city": 'Oslo "N"', "days": 2})
        assert finish == "tool_calls" and content == "Let me see."
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "assistant", "content": content, "reasoning_content": "I look it up.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": [{"type": "text", "text": "-3 C"}]},
        ]
        answer = api.chat.completions.create(model="nano", messages=messages, tools=[WEATHER])  # type: ignore
        assert answer.choices[0].message.content == "It is -3 C."
        assert "<think>I look it up.</think>Let me see." in scripted.prompts[-1]


def test_tools_that_are_not_to_be_used_are_not_called(url: str) -> None:
    answer = client(url).chat.completions.with_raw_response.create(
        model="nano", messages=QUESTION, tools=[WEATHER], tool_choice="none"  # type: ignore[list-item]
    )
    parsed = answer.parse()
    assert not parsed.choices[0].message.tool_calls and parsed.choices[0].finish_reason == "stop"
    assert DSML not in (parsed.choices[0].message.content or "")
    assert "rejected_call" in answer.headers["x-abyssal-repaired"]


def test_stop_length_logprobs_and_n(url: str) -> None:
    api = client(url)
    answer = api.chat.completions.create(model="nano", messages=QUESTION, stop=["STOP", "never"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello, world! ", "stop")
    answer = api.chat.completions.create(model="nano", messages=QUESTION, max_tokens=30)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello, wo", "length")
    answer = api.chat.completions.create(model="nano", messages=QUESTION, n=3, logprobs=True, top_logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    logprobs = answer.choices[2].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert logprobs.content[0].token == "I" and logprobs.content[0].top_logprobs[0].logprob == -0.5


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, None),
        ({"messages": [{"role": "robot", "content": ""}]}, openai.BadRequestError, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, None),
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature"),
        ({"top_logprobs": 21}, openai.UnprocessableEntityError, "top_logprobs"),
        ({"top_logprobs": 2}, openai.UnprocessableEntityError, "top_logprobs"),
        ({"n": 0}, openai.UnprocessableEntityError, "n"),
        ({"stop": ["x"] * 17}, openai.UnprocessableEntityError, "stop"),
        ({"reasoning_effort": "huge"}, openai.UnprocessableEntityError, "reasoning_effort"),
        ({"audio": {"voice": "x"}}, openai.BadRequestError, "audio"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
        ({"tool_choice": "required"}, openai.BadRequestError, None),
        ({"tool_choice": "sometimes"}, openai.BadRequestError, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, openai.BadRequestError, "tool_choice"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "so"}]}, openai.BadRequestError, None),
        ({"thinking": {"type": "sometimes"}}, openai.UnprocessableEntityError, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, openai.UnprocessableEntityError,
         "thinking.budget_tokens"),
    ],
)
def test_bad_requests(url: str, change: dict[str, Any], error: type[openai.APIStatusError], param: str | None) -> None:
    body = {"model": "nano", "messages": QUESTION, **change}
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client(url).post("/chat/completions", body={**body, "stream": stream}, cast_to=object)
        assert caught.value.body["param"] == param  # type: ignore[index]
        assert caught.value.body["message"]  # type: ignore[index]


def raw(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json", **headers})
    answer = connection.getresponse()
    data = json.loads(answer.read())
    connection.close()
    return answer.status, data


def test_bodies_that_are_no_request(url: str) -> None:
    for body in (b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000):
        status, data = raw(url, body)
        assert status == 400 and data["error"]["type"] == "invalid_request_error"
    assert raw(url, b'{"model": "nano"}')[0] == 400
    with serving(Scripted(script), Settings(body_bytes=1000)) as small:
        assert raw(small, b"x" * 2000)[0] == 413
    assert raw(url, json.dumps({"model": "nano", "messages": QUESTION, "dsh_session_log": 1}).encode())[0] == 200


def test_a_prompt_beyond_the_context_names_both_numbers() -> None:
    with serving(Scripted(script, context=50)) as url:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="the context holds 50") as caught:
                client(url).chat.completions.create(
                    model="nano", messages=[{"role": "user", "content": "x" * 90}], stream=stream
                )
            assert caught.value.code == "context_length_exceeded"


def test_think_max_needs_a_long_context() -> None:
    with serving(Scripted(script, context=1000)) as url, pytest.raises(openai.BadRequestError, match=r"393216 .* 1000"):
        client(url).post(
            "/chat/completions", body={"model": "nano", "messages": QUESTION, "reasoning_effort": "max"}, cast_to=object
        )


def test_keys() -> None:
    with serving(Scripted(script), Settings(api_keys=keys(["one", "two"]))) as url:
        for key in ("one", "two"):
            assert client(url, key).models.list().data[0].id == "nano"
        with pytest.raises(openai.AuthenticationError):
            client(url, "three").models.list()
        with pytest.raises(openai.AuthenticationError):
            client(url, "three").chat.completions.create(model="nano", messages=QUESTION)


def test_names() -> None:
    with serving(Scripted(script)) as url:
        api = client(url)
        assert {model.id for model in api.models.list()} == {
            "nano", "deepseek-v4-pro", "deepseek-v4-flash", "deepseek-flash"
        }  # fmt: skip
        answer = api.chat.completions.with_raw_response.create(model="deepseek-chat", messages=QUESTION)
        assert answer.headers["deprecation"] == "true" and answer.headers["x-abyssal-model"] == "nano"
        assert not hasattr(answer.parse().choices[0].message, "reasoning_content")
        answer = api.chat.completions.with_raw_response.create(model="deepseek-reasoner", messages=QUESTION)
        assert answer.parse().choices[0].message.reasoning_content  # type: ignore[attr-defined]
        assert api.models.retrieve("deepseek-v4-pro").object == "model"
        with pytest.raises(openai.NotFoundError):
            api.models.retrieve("gpt-5")
    with serving(Scripted(script), Settings(legacy_names=False)) as url, pytest.raises(openai.BadRequestError):
        client(url).chat.completions.create(model="deepseek-chat", messages=QUESTION)


def test_when_the_client_leaves_the_work_ends() -> None:
    scripted = Scripted(lambda _: "</think>" + "x" * 100_000, pause=0.01)
    with serving(scripted) as url:
        stream = client(url).chat.completions.create(model="nano", messages=QUESTION, stream=True)
        next(iter(stream))
        assert scripted.active == 1
        stream.close()
        body = json.dumps({"model": "nano", "messages": QUESTION}).encode()
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        connection.request("POST", "/v1/chat/completions", body)
        time.sleep(0.3)
        connection.close()
        end = time.monotonic() + 5
        while scripted.active and time.monotonic() < end:
            time.sleep(0.02)
        assert scripted.active == 0


def test_too_many_at_once_are_told_to_come_back() -> None:
    with serving(Scripted(lambda _: "</think>" + "x" * 1000, pause=0.01), Settings(requests=1)) as url:
        stream = client(url).chat.completions.create(model="nano", messages=QUESTION, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client(url).chat.completions.create(model="nano", messages=QUESTION)
        assert int(caught.value.response.headers["retry-after"]) > 0
        stream.close()


def test_unknown_routes_have_the_vendors_shape(url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client(url).post("/nothing", body={}, cast_to=object)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCompleter]:
    model = load_model(bundled_folder()).requires_grad_(False)
    tokenizer = Tokenizer(bundled_folder())
    engine = Engine(
        model, budget=1 << 29, slots=16, prefix=lambda memory: PrefixCache(memory, "test"),
        token_bytes=tokenizer.token_bytes,
    )  # fmt: skip
    completer = LocalCompleter(engine, tokenizer, "nano")
    yield completer
    completer.close()


def test_the_bundled_model_answers_many_at_once(local: LocalCompleter) -> None:
    """Real tokens: answers with a seed are the same alone and among others, and prompts are reused."""
    text = "And it came to pass in those days, that there went out a decree. " * 40
    messages: Any = [{"role": "user", "content": text}]

    with serving(local) as url:

        def ask(seed: int) -> Any:
            return client(url).chat.completions.create(
                model="nano", messages=messages, seed=seed, max_tokens=20, temperature=0.8, logprobs=True,
                extra_body={"thinking": {"type": "disabled"}},
            )  # fmt: skip

        alone = [ask(seed) for seed in range(4)]
        assert alone[1].usage.prompt_tokens_details.cached_tokens >= 512
        together: dict[int, Any] = {}
        threads = [threading.Thread(target=lambda s=seed: together.update({s: ask(s)})) for seed in range(4)]  # type: ignore
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed in range(4):
            one, other = alone[seed].choices[0], together[seed].choices[0]
            assert one.message.content == other.message.content
            assert [t.logprob for t in one.logprobs.content] == [t.logprob for t in other.logprobs.content]
        stream = client(url).chat.completions.create(
            model="nano", messages=messages, max_tokens=2000, stream=True, extra_body={"thinking": {"type": "disabled"}}
        )
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        stream.close()
        end = time.monotonic() + 10
        while local.engine.busy and time.monotonic() < end:
            time.sleep(0.02)
        assert not local.engine.busy
        assert local.engine.memory.slots.free == local.engine.memory.slots.count


def test_a_prefix_is_continued_and_not_repeated() -> None:
    scripted = Scripted(lambda _: " world")
    with serving(scripted) as url:
        messages: Any = [*QUESTION, {"role": "assistant", "content": "Hello,", "prefix": True}]
        answer = openai.OpenAI(base_url=f"{url}/beta", api_key="none").chat.completions.create(
            model="deepseek-v4-pro", messages=messages
        )
        assert answer.choices[0].message.content == " world"
        assert scripted.prompts[-1].endswith("</think>Hello,")
        with pytest.raises(openai.BadRequestError, match="prefix"):
            client(url).chat.completions.create(
                model="nano", messages=messages, response_format={"type": "json_object"}
            )


def test_a_system_reminder_at_the_end_is_answered_and_keeps_the_prefix() -> None:
    """A system message that moves must not change what stands before it, or nothing is reused."""
    scripted = Scripted(script)
    with serving(scripted) as url:
        for more in ([], [{"role": "system", "content": "Be short."}]):
            messages: Any = [{"role": "system", "content": "S"}, *QUESTION, *more]
            answer = client(url).chat.completions.create(model="nano", messages=messages)
            assert answer.choices[0].message.content == "Hello, world! STOP here."
        before, after = scripted.prompts
        assert after.startswith(before.removesuffix("<｜Assistant｜><think>"))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", None])
def test_reasoning_comes_back_under_any_name_or_is_restored(field: str | None) -> None:
    scripted = Scripted(script)
    with serving(scripted) as url, serving(Scripted(script), Settings(strict=True)) as strict:
        first = client(url).chat.completions.create(model="nano", messages=QUESTION, tools=[WEATHER])  # type: ignore
        (call,) = first.choices[0].message.tool_calls or []
        said: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
        if field:
            said[field] = "I look it up."
        messages: Any = [*QUESTION, said, {"role": "tool", "tool_call_id": call.id, "content": "1 C"}]
        raw = client(url).chat.completions.with_raw_response.create(model="nano", messages=messages, tools=[WEATHER])  # type: ignore
        assert "<think>I look it up.</think>" in scripted.prompts[-1]
        assert raw.headers.get("x-abyssal-repaired") == (None if field else "restored_reasoning")
        ask: Any = {"model": "nano", "messages": messages, "tools": [WEATHER]}
        if field:
            assert client(strict).chat.completions.create(**ask).choices[0].finish_reason == "stop"
        else:
            with pytest.raises(openai.BadRequestError, match="must be passed back"):
                client(strict).chat.completions.create(**ask)
        # without tools in play earlier reasoning does not matter
        plain: Any = [*QUESTION, {"role": "assistant", "content": "a"}, *QUESTION]
        assert client(strict).chat.completions.create(model="nano", messages=plain).choices[0].message.content


def test_effort_max_falls_back_where_that_is_allowed() -> None:
    with serving(Scripted(script, context=1000)) as url:
        raw = client(url).chat.completions.with_raw_response.create(
            model="nano", messages=QUESTION, reasoning_effort="max", extra_body={"allow_effort_fallback": True}  # type: ignore
        )
        assert "high was used" in raw.headers["x-abyssal-notes"]
        assert "max" not in client(url).models.list().data[0].efforts  # type: ignore[attr-defined]


def test_efforts_reach_the_prompt() -> None:
    scripted = Scripted(script)
    scripted.snapshot = "0731"
    with serving(scripted) as url:
        heads = {}
        for effort in ("minimal", "low", "medium", "high", "xhigh", "max", "ultra", None):
            more: Any = {} if effort is None else {"reasoning_effort": effort}
            client(url).chat.completions.create(model="nano", messages=QUESTION, **more)
            heads[effort] = scripted.prompts[-1].split("Reasoning Effort: ")[-1][:8]
        assert heads["minimal"] == heads["low"] and "Absolute" not in heads["low"]
        assert {heads[e] for e in ("medium", "high", "xhigh", None)} == {"Absolute"}
        assert heads["max"] == heads["ultra"] == "Beyond m"


def test_the_vendors_sampling_and_the_reserve_for_the_answer() -> None:
    scripted = Scripted(script)
    with serving(scripted, Settings(vendor_sampling=True, answer_reserve=100)) as url:
        ask: Any = {"model": "nano", "messages": QUESTION, "temperature": 0.2, "presence_penalty": 1.0}
        client(url).chat.completions.create(**ask, max_tokens=150)
        sampling = scripted.completions[-1].sampling
        assert (sampling.temperature, sampling.presence_penalty) == (1.0, 0.0)
        assert scripted.completions[-1].max_reasoning == 50
        client(url).chat.completions.create(**ask, extra_body={"thinking": {"type": "disabled"}}, max_tokens=150)
        assert scripted.completions[-1].sampling.temperature == 0.2 and scripted.completions[-1].max_reasoning is None
