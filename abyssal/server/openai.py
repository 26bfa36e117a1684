"""OpenAI Chat Completions over chat events (api.md 4)."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import (
    Accepted,
    CallMade,
    ChatEvent,
    ChatRequest,
    Completer,
    Finished,
    ReasoningDelta,
    Repaired,
    Sampling,
    TextDelta,
    TokenInfo,
    TokensRead,
    Usage,
)
from abyssal.chat.turn import answer
from abyssal.encoding.messages import Conversation
from abyssal.encoding.snapshots import Effort
from abyssal.server import sse
from abyssal.server.errors import ApiError, api_error
from abyssal.server.names import resolve

# requested to actual (api.md 3)
EFFORTS: dict[str, Effort] = {
    "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max", "ultra": "max",
}  # fmt: skip
REFUSED = ("audio", "functions", "function_call", "web_search_options", "modalities")


class _Thinking(BaseModel):
    type: Literal["enabled", "disabled"]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatBody(BaseModel):
    """The fields of a request that we know; others are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    thinking: _Thinking | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


def read_body(data: Any) -> ChatBody:
    """Check a request's JSON.

    Raises:
        ApiError: 400 for a malformed body or a field that is not supported, 422 for a value out of range.
    """
    if not isinstance(data, Mapping):
        raise ApiError(400, "the body is no JSON object: send one")
    for name in REFUSED:
        if data.get(name) is not None:
            raise ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
    try:
        return ChatBody.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]"))
        status = 400 if first["type"] == "missing" else 422
        raise ApiError(status, f"{path}: {first['msg']}", param=path) from None


@dataclass(frozen=True)
class Asked:
    """A checked request: what to ask the chat, and how to answer."""

    body: ChatBody
    request: ChatRequest
    notes: tuple[str, ...] = ()
    deprecated: bool = False


def _thinking(body: ChatBody, default: bool) -> bool:
    if body.thinking is not None:
        return body.thinking.type == "enabled"
    for name in ("thinking", "enable_thinking"):
        value = (body.chat_template_kwargs or {}).get(name)
        if isinstance(value, bool):
            return value
    return default


def _tools(body: ChatBody) -> tuple[list[Any] | None, bool]:
    """Tools to show, and whether they may be used."""
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return body.tools, True
    if choice == "none":
        return body.tools, False
    raise ApiError(
        400,
        f"tool_choice {choice!r} is not supported yet: use auto or none",
        param="tool_choice",
        code="unsupported_parameter",
    )


def asked(body: ChatBody, completer: Completer, *, legacy: bool = True) -> Asked:
    """Translate a request.

    Raises:
        ApiError: the model is unknown or a value is not supported.
        InputError: messages or tools are malformed.
    """
    named = resolve(body.model, completer.model, legacy=legacy)
    extra = body.model_extra or {}
    form = extra.get("response_format")
    if isinstance(form, Mapping) and form.get("type") not in (None, "text"):
        raise ApiError(
            400, f"response_format {form.get('type')!r} is not supported yet: use text", param="response_format"
        )
    effort: Effort | None = None
    if body.reasoning_effort not in (None, "none"):
        effort = EFFORTS.get(str(body.reasoning_effort))
        if effort is None:
            known = ", ".join(EFFORTS)
            raise ApiError(
                422, f"reasoning_effort {body.reasoning_effort!r} is unknown: use {known}", param="reasoning_effort"
            )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > 16 or not all(stop):
        raise ApiError(422, "stop: give up to 16 texts, none of them empty", param="stop")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(422, "top_logprobs needs logprobs: true", param="top_logprobs")
    tools, use = _tools(body)
    conversation = Conversation.from_json(body.messages, tools)
    given = {
        name: getattr(body, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                     "repetition_penalty", "logit_bias", "seed")
        if getattr(body, name) is not None
    }  # fmt: skip
    request = ChatRequest(
        messages=conversation.messages,
        thinking=_thinking(body, named.thinking) and body.reasoning_effort != "none",
        effort=effort,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        sampling=Sampling(**given),
        use_tools=use,
        stop=tuple(stop),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
    )
    return Asked(body, request, deprecated=named.deprecated)


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


def _logprob(completer: Completer, info: TokenInfo) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = completer.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return {**entry(info.token, info.logprob), "top_logprobs": [entry(t, p) for t, p in info.top]}


@dataclass
class _Choice:
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None


def _head(completer: Completer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": completer.model,
        "system_fingerprint": f"abyssal-{completer.snapshot}",
    }


def _call(event: CallMade) -> dict[str, Any]:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": event.arguments}}


async def complete(completer: Completer, asked: Asked) -> tuple[dict[str, Any], list[str]]:
    """The whole answer, and what was repaired.

    Raises:
        InputError: the request cannot be done.
        ApiError: 500, generation failed.
    """
    choices = [_Choice() for _ in range(asked.request.n)]
    repairs: list[str] = []
    usage = Usage(0, 0, 0, 0)
    async with aclosing(answer(completer, asked.request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Accepted):
                continue
            if isinstance(event, Usage):
                usage = event
                continue
            choice = choices[event.choice]
            if isinstance(event, ReasoningDelta):
                choice.reasoning += event.text
            elif isinstance(event, TextDelta):
                choice.content += event.text
            elif isinstance(event, CallMade):
                choice.calls.append(_call(event))
            elif isinstance(event, TokensRead):
                choice.logprobs += [_logprob(completer, info) for info in event.tokens]
            elif isinstance(event, Repaired):
                repairs.append(event.name)
            else:
                if event.reason == "failed":
                    raise ApiError(500, event.error or "generation was interrupted: try again")
                choice.finish = event.reason
    body = _head(completer, "chat.completion")
    body["choices"] = []
    for i, choice in enumerate(choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.content or (None if choice.calls else "")}
        if asked.request.thinking:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = {"content": choice.logprobs, "refusal": None} if asked.body.logprobs else None
        body["choices"].append(
            {"index": i, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        )
    body["usage"] = usage_of(usage)
    return body, repairs


async def stream(completer: Completer, asked: Asked) -> AsyncIterator[bytes]:
    """The answer as chunks.

    The first chunk names the role and comes when the request is accepted; what is refused is raised before it.
    An error after that is an event of its own, and the stream ends.
    """
    head = _head(completer, "chat.completion.chunk")
    wants_usage = asked.body.stream_options is not None and asked.body.stream_options.include_usage
    accepted = False

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse.data({**head, "choices": [choice], **({"usage": None} if wants_usage else {})})

    try:
        async with aclosing(answer(completer, asked.request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Accepted):
                    accepted = True
                    for index in range(asked.request.n):
                        yield chunk(index, {"role": "assistant", "content": ""})
                elif isinstance(event, Usage):
                    if wants_usage:
                        yield sse.data({**head, "choices": [], "usage": usage_of(event)})
                elif isinstance(event, Repaired):
                    continue
                elif (made := _delta(completer, event)) is not None:
                    delta, finish, logprobs = made
                    yield chunk(event.choice, delta, finish, logprobs)
                elif isinstance(event, Finished):
                    raise ApiError(500, event.error or "generation was interrupted: try again")
    except AbyssalError as error:
        if not accepted:
            raise
        yield sse.data(api_error(error).openai())
        return
    yield sse.DONE


def _delta(completer: Completer, event: ChatEvent) -> tuple[dict[str, Any], str | None, Any] | None:
    """Delta, finish reason and log-probabilities of an event; None for a failure or what has no chunk."""
    if isinstance(event, ReasoningDelta):
        return {"reasoning_content": event.text}, None, None
    if isinstance(event, TextDelta):
        return {"content": event.text}, None, None
    if isinstance(event, CallMade):
        return {"tool_calls": [{"index": event.index, **_call(event)}]}, None, None
    if isinstance(event, TokensRead):
        return {}, None, {"content": [_logprob(completer, info) for info in event.tokens], "refusal": None}
    if isinstance(event, Finished) and event.reason != "failed":
        return {}, event.reason, None
    return None
