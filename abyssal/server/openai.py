"""OpenAI Chat Completions over chat events (api.md 4)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import (
    Accepted,
    CallMade,
    ChatEvent,
    ChatRequest,
    Completer,
    Finished,
    PromptUse,
    ReasoningDelta,
    Repaired,
    TextDelta,
    TokenInfo,
    TokensRead,
    ToolMode,
    Usage,
)
from abyssal.encoding.messages import Conversation
from abyssal.server import sse
from abyssal.server.blocks import pieces
from abyssal.server.errors import ApiError, api_error
from abyssal.server.fields import SampledBody, Thinking, checked, effort_of, format_of, refuse, stops_of
from abyssal.server.names import Named, resolve
from abyssal.server.service import Service, Turn

REFUSED = ("audio", "functions", "function_call", "web_search_options", "modalities")
FINISH = {"interrupted": "insufficient_system_resource"}


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = False


class ChatBody(SampledBody):
    """The fields of a request that we know; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    thinking: Thinking | None = None
    reasoning_effort: str | None = None
    allow_effort_fallback: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        request: what to ask the chat.
        named: what its model name means.
        streams: whether the answer comes in pieces.
        usage: whether a stream ends with the usage.
    """

    request: ChatRequest
    named: Named
    streams: bool
    usage: bool


def _thinks(body: ChatBody, default: bool) -> bool:
    if body.reasoning_effort == "none":
        return False
    if body.thinking is not None:
        return body.thinking.on
    for name in ("thinking", "enable_thinking"):
        value = (body.chat_template_kwargs or {}).get(name)
        if isinstance(value, bool):
            return value
    return default


def tool_choice(choice: Any) -> tuple[ToolMode, str | None]:
    """Whether tools are to be used, and which one must be.

    Raises:
        ApiError: 400, another choice.
    """
    modes: dict[Any, ToolMode] = {None: "auto", "auto": "auto", "none": "none", "required": "required"}
    if choice is None or isinstance(choice, str):
        if choice in modes:
            return modes[choice], None
    elif isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function", choice)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return "required", function["name"]
    raise ApiError(
        400, f"tool_choice {choice!r} is unknown: use auto, none, required, or a function by name", param="tool_choice"
    )


def _answerable(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with a system message at the end as the user's: the encoder opens no answer behind the former."""
    if messages and messages[-1].get("role") == "system":
        return [*messages[:-1], {**messages[-1], "role": "user"}]
    return messages


def asked(data: Any, service: Service) -> Asked:
    """Check and translate a request.

    Raises:
        ApiError: 400 for a malformed body or a field that is not supported, 404 for an unknown model, 422 for a
            value out of range.
        InputError: messages or tools are malformed.
    """
    refuse(data, REFUSED)
    body = checked(ChatBody, data)
    named = resolve(body.model, service.completer.model, legacy=service.settings.legacy_names)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(422, "top_logprobs needs logprobs: true", param="top_logprobs")
    mode, name = tool_choice(body.tool_choice)
    form = format_of(body.response_format, "response_format")
    thinks = _thinks(body, named.thinking)
    request = ChatRequest(
        messages=Conversation.from_json(_answerable(body.messages), body.tools, form.in_prompt).messages,
        thinking=thinks,
        effort=effort_of(body.reasoning_effort, "reasoning_effort") if thinks else None,
        allow_effort_fallback=bool(body.allow_effort_fallback),
        max_reasoning=body.thinking.budget_tokens if body.thinking is not None else None,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        sampling=body.sampling(),
        tool_mode=mode,
        tool_name=name,
        parallel_calls=body.parallel_tool_calls is not False,
        schema=form.schema,
        schema_strict=form.strict,
        stop=stops_of(body.stop, "stop"),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
    )  # fmt: skip
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Asked(request, named, bool(body.stream), wants_usage)


def usage_of(usage: Usage) -> dict[str, Any]:
    """The usage object."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_cache_hit_tokens": usage.cached,
        "prompt_cache_miss_tokens": usage.prompt - usage.cached,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def logprob_of(completer: Completer, info: TokenInfo, count: int) -> dict[str, Any]:
    """A token's log-probability, beside those of the `count` likeliest."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = completer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return {**entry(info.token, info.logprob), "top_logprobs": [entry(t, p) for t, p in info.top[:count]]}


def _logprobs(turn: Turn, event: TokensRead) -> list[dict[str, Any]]:
    return [logprob_of(turn.completer, info, turn.request.top_logprobs or 0) for info in event.tokens]


@dataclass
class _Choice:
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None


def _head(turn: Turn, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{turn.id[4:]}",
        "object": kind,
        "created": int(time.time()),
        "model": turn.completer.model,
        "system_fingerprint": f"abyssal-{turn.completer.snapshot}",
    }


def _call(event: CallMade) -> dict[str, Any]:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": event.arguments}}


async def whole(turn: Turn, asked: Asked) -> AsyncIterator[dict[str, Any] | None]:
    """None once the request is accepted, then the answer.

    Raises:
        InputError: the request cannot be done.
        ApiError: 500, generation failed.
    """
    choices = [_Choice() for _ in range(turn.request.n)]
    usage = Usage(0, 0, 0, 0)
    async with aclosing(turn.events()) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Accepted):
                yield None
            elif isinstance(event, Usage):
                usage = event
            elif isinstance(event, ReasoningDelta):
                choices[event.choice].reasoning.append(event.text)
            elif isinstance(event, TextDelta):
                choices[event.choice].content.append(event.text)
            elif isinstance(event, CallMade):
                choices[event.choice].calls.append(_call(event))
            elif isinstance(event, TokensRead):
                choices[event.choice].logprobs += _logprobs(turn, event)
            elif isinstance(event, Finished):
                if event.reason == "failed":
                    raise ApiError(500, event.error or "generation failed: try again")
                choices[event.choice].finish = FINISH.get(event.reason, event.reason)
    body = _head(turn, "chat.completion")
    body["choices"] = []
    for i, choice in enumerate(choices):
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if choice.calls else "")}
        if turn.request.thinking:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = {"content": choice.logprobs, "refusal": None} if turn.request.top_logprobs is not None else None
        body["choices"].append(
            {"index": i, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        )
    body["usage"] = usage_of(usage)
    yield body


async def stream(turn: Turn, asked: Asked) -> AsyncIterator[bytes]:
    """The answer as chunks.

    The first chunk names the role and comes when the request is accepted; what is refused is raised before it.
    An error after that is an event of its own, and the stream ends.
    """
    # what all chunks share is written once
    head = json.dumps(_head(turn, "chat.completion.chunk"), separators=(",", ":"))[:-1].encode()
    tail = b'],"usage":null}\n\n' if asked.usage else b"]}\n\n"
    accepted = False

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return b"".join((b"data: ", head, b',"choices":[', sse.compact(choice), tail))

    def said(index: int, name: str, text: str) -> bytes:
        """A chunk with text, which most are: as `chunk` writes it, in a third of the time."""
        return b'data: %b,"choices":[{"index":%d,"delta":{"%b":%b},"logprobs":null,"finish_reason":null}%b' % (
            head, index, name.encode(), sse.compact(text), tail
        )  # fmt: skip

    try:
        async with aclosing(turn.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, TextDelta):
                    yield said(event.choice, "content", event.text)
                elif isinstance(event, ReasoningDelta):
                    yield said(event.choice, "reasoning_content", event.text)
                elif isinstance(event, Accepted):
                    accepted = True
                    for index in range(turn.request.n):
                        yield chunk(index, {"role": "assistant", "content": ""})
                elif isinstance(event, Usage):
                    if asked.usage:
                        usage = {**_head(turn, "chat.completion.chunk"), "choices": [], "usage": usage_of(event)}
                        yield sse.data(usage)
                elif isinstance(event, PromptUse | Repaired):
                    continue
                elif isinstance(event, Finished) and event.reason == "failed":
                    raise ApiError(500, event.error or "generation failed: try again")
                else:
                    for delta, finish, logprobs in _deltas(turn, event):
                        yield chunk(event.choice, delta, finish, logprobs)
    except AbyssalError as error:
        if not accepted:
            raise
        yield sse.data(api_error(error).openai())
        return
    yield sse.DONE


def _deltas(turn: Turn, event: ChatEvent) -> list[tuple[dict[str, Any], str | None, Any]]:
    """Deltas of an event that is no text, with finish reason and log-probabilities."""
    if isinstance(event, CallMade):
        begun = _call(event)
        begun["function"]["arguments"] = ""
        calls = [{"index": event.index, **begun}]
        calls += [{"index": event.index, "function": {"arguments": piece}} for piece in pieces(event.arguments)]
        return [({"tool_calls": [call]}, None, None) for call in calls]
    if isinstance(event, TokensRead):
        return [({}, None, {"content": _logprobs(turn, event), "refusal": None})]
    if isinstance(event, Finished):
        return [({}, FINISH.get(event.reason, event.reason), None)]
    return []
