"""Anthropic Messages over chat events (api.md 5)."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import Accepted, ChatEvent, ChatRequest, Finished, PromptUse, Sampling, ToolMode, Usage
from abyssal.chat.turn import prompt_of
from abyssal.encoding.messages import Message, text_of
from abyssal.server import sse
from abyssal.server.blocks import Blocks, Change, Closed, Opened
from abyssal.server.errors import ApiError, api_error
from abyssal.server.fields import Thinking, checked, conversation, effort_of, format_of, given, stops_of
from abyssal.server.names import Named, resolve
from abyssal.server.service import Service, Turn

FILLER = sse.event({"type": "ping"})
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES: dict[str, ToolMode] = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}


class _OutputConfig(BaseModel):
    effort: str | None = None
    format: dict[str, Any] | None = None


class _ToolChoice(BaseModel):
    type: Literal["auto", "none", "any", "tool"] = "auto"
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountBody(BaseModel):
    """The fields of a request that we know and that its prompt depends on, or that go with these.

    Others are ignored and are no part of the prompt: an agent's `dsh_*`, `cache_control`, `metadata` and more.
    """

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[dict[str, Any]]
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: _ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: _OutputConfig | None = None
    allow_effort_fallback: bool | None = None


class MessagesBody(CountBody):
    """The fields of a request for an answer."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        request: what to ask the chat.
        named: what its model name means.
        streams: whether the answer comes in pieces.
    """

    request: ChatRequest
    named: Named
    streams: bool


def signature(key: bytes, text: str) -> str:
    """An opaque keyed hash of a thinking block."""
    return hmac.new(key, text.encode(errors="replace"), hashlib.sha256).hexdigest()


def asked(data: Any, service: Service) -> Asked:
    """Check and translate a request.

    Raises:
        ApiError: 400 for a malformed body or a block that is not supported, 404 for an unknown model, 422 for a
            value out of range.
        InputError: messages or tools are malformed.
    """
    body = checked(MessagesBody, data)
    request, named = _translated(body, service)
    request = replace(
        request,
        max_tokens=body.max_tokens,
        sampling=Sampling(**given(body, "temperature", "top_p", "top_k")),
        stop=stops_of(body.stop_sequences, "stop_sequences"),
    )
    return Asked(request, named, bool(body.stream))


def counted(data: Any, service: Service, caller: str) -> dict[str, int]:
    """How many tokens the prompt of a request has.

    Raises:
        ApiError, InputError: as a request for an answer.
    """
    request, _ = _translated(checked(CountBody, data), service)
    turn = service.turn(request, caller, "count_tokens")
    return {"input_tokens": turn.completer.count(prompt_of(turn.completer, turn.request))}


def _translated(body: CountBody, service: Service) -> tuple[ChatRequest, Named]:
    named = resolve(body.model, service.completer.model, legacy=service.settings.legacy_names)
    config = body.output_config or _OutputConfig()
    thinks = body.thinking.on if body.thinking is not None else named.thinking and config.effort != "none"
    choice = body.tool_choice or _ToolChoice()
    if choice.type == "tool" and not choice.name:
        raise ApiError(400, "tool_choice of type tool has no name: give one", param="tool_choice.name")
    form = format_of(config.format, "output_config.format")
    tools = [_function(tool, f"tools.{i}") for i, tool in enumerate(body.tools or ())]
    request = ChatRequest(
        messages=_messages(body, tools, form.in_prompt, service),
        thinking=thinks,
        effort=effort_of(config.effort, "output_config.effort") if thinks else None,
        allow_effort_fallback=bool(body.allow_effort_fallback),
        max_reasoning=body.thinking.budget_tokens if body.thinking is not None else None,
        tool_mode=CHOICES[choice.type],
        tool_name=choice.name if choice.type == "tool" else None,
        parallel_calls=not choice.disable_parallel_tool_use,
        schema=form.schema,
        schema_strict=form.strict,
    )
    return request, named


def _function(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool in OpenAI's form, its fields in the order in which the vendor's examples show them to the model."""
    if tool.get("type") not in (None, "custom"):
        text = f"{where}: tool type {tool['type']!r} is not supported: give name and input_schema"
        raise ApiError(400, text, param=where, code="unsupported_parameter")
    function = {"name": tool.get("name"), "description": tool.get("description"),
                "parameters": tool.get("input_schema") or {"type": "object", "properties": {}},
                "strict": tool.get("strict")}  # fmt: skip
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _messages(
    body: CountBody, tools: Sequence[dict[str, Any]], schema: Mapping[str, Any] | None, service: Service
) -> tuple[Message, ...]:
    """The conversation; an answer at its end is a prefix of the answer that is asked for."""
    key = service.signing if service.settings.strict else None
    made = [{"role": "system", "content": text_of(body.system, "system")}] if body.system else []
    for i, message in enumerate(body.messages):
        made += _turns(message, f"messages.{i}", key)
    if made and made[-1]["role"] == "assistant" and not any(made[-1][part] for part in _PARTS):
        made.pop()  # an empty answer at the end is allowed, and is no prefix
    messages = conversation(made, tools, schema)
    if messages[-1].role != "assistant":
        return messages
    if messages[-1].tool_calls:
        raise ApiError(400, "the messages end with a tool_use: send its tool_result", param="messages")
    return (*messages[:-1], replace(messages[-1], prefix=True))


_PARTS = ("content", "reasoning_content", "tool_calls")


def _turns(message: Mapping[str, Any], where: str, key: bytes | None) -> list[dict[str, Any]]:
    """One message in OpenAI's form, where the results of tools are messages of their own.

    Args:
        message: in Anthropic's form.
        where: its place, for errors.
        key: of the signatures that thinking must have; None accepts any.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ApiError(400, f"{where}: role {role!r} is unknown: use user or assistant", param=where)
    if role == "system":
        return [{"role": role, "content": text_of(content, role)}]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise ApiError(400, f"{where}: content is no text and no list of blocks: give one of them", param=where)
    places = [f"{where}.content.{i}" for i in range(len(blocks))]
    if role == "assistant":
        return [_answer(blocks, places, key)]
    # an empty turn is still one, between two answers
    return [_asked(block, place) for block, place in zip(blocks, places, strict=True)] or [
        {"role": "user", "content": ""}
    ]


def _asked(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A block of a user's message."""
    if block.get("type") == "text":
        return {"role": "user", "content": text_of([block], "user")}
    if block.get("type") != "tool_result":
        raise _unsupported(block, "user", where)
    text = text_of(block.get("content"), "tool")
    # the prompt format knows no failed results, so the text has to tell; what the vendor does is not known
    text = f"Error: {text}" if block.get("is_error") else text
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _answer(blocks: Sequence[Mapping[str, Any]], places: Sequence[str], key: bytes | None) -> dict[str, Any]:
    """The blocks of an assistant's message."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, where in zip(blocks, places, strict=True):
        kind = block.get("type")
        if kind == "text":
            texts.append(text_of([block], "assistant"))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
            if key is not None and not _signed(block, key, thoughts[-1]):
                raise ApiError(400, f"{where}: Invalid `signature` in `thinking` block", param=where)
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "function": function})
        elif kind != "redacted_thinking":
            raise _unsupported(block, "assistant", where)
    # one answer's texts are one text; its thinking is unknown, not empty, if there is no block of it
    reasoning = "\n\n".join(thoughts) if thoughts else None
    return {"role": "assistant", "content": "".join(texts), "reasoning_content": reasoning, "tool_calls": calls}


def _signed(block: Mapping[str, Any], key: bytes, thought: str) -> bool:
    sent = str(block.get("signature") or "").encode(errors="replace")
    return hmac.compare_digest(sent, signature(key, thought).encode())


def _unsupported(block: Mapping[str, Any], role: str, where: str) -> ApiError:
    text = f"{where}: a block of type {block.get('type')!r} is not supported in a message of the {role}: leave it out"
    return ApiError(400, text, param=where, code="unsupported_parameter")


def usage_of(usage: Usage) -> dict[str, Any]:
    """The usage object; input tokens are those that were not cached."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


class _Answer:
    """The answer to a request as it grows.

    Attributes:
        content: the blocks that are over.
        usage: what it took, once it is over.
    """

    def __init__(self, turn: Turn):
        self.content: list[dict[str, Any]] = []
        self.usage = Usage(0, 0, 0, 0)
        self._turn = turn
        self._blocks = Blocks(turn.request)
        self._begun = False
        self._reason: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def message(self, usage: Usage) -> dict[str, Any]:
        """The message object as it is now."""
        return {"id": f"msg_{self._turn.id[4:]}", "type": "message", "role": "assistant",
                "model": self._turn.completer.model, "content": self.content, **self._reason,
                "usage": usage_of(usage)}  # fmt: skip

    def add(self, event: ChatEvent) -> list[dict[str, Any]]:
        """The stream's events for an event of the turn.

        Raises:
            ApiError: generation failed or was interrupted.
        """
        if not self._begun:  # how long the prompt is, and what of it was cached, is known once it is read
            self._begun = True
            read = event if isinstance(event, PromptUse) else PromptUse(0, 0)
            start = {"type": "message_start", "message": self.message(Usage(read.tokens, read.cached, 0, 0))}
            return [start, *self.add(event)]
        if isinstance(event, Usage):
            self.usage = event
            return [
                {"type": "message_delta", "delta": self._reason, "usage": usage_of(event)},
                {"type": "message_stop"},
            ]
        if isinstance(event, Finished):
            reason = STOP_REASONS.get(event.reason) if event.stop is None else "stop_sequence"
            self._reason = {"stop_reason": reason, "stop_sequence": event.stop}
        return [made for change in self._blocks.add(event) for made in self._changed(change)]

    def _changed(self, change: Change) -> list[dict[str, Any]]:
        if isinstance(change, Opened):
            return [self._event("start", change, content_block=_block(change, "", ""))]
        if not isinstance(change, Closed):
            name, field = _DELTAS[change.kind]
            return [self._event("delta", change, delta={"type": name, field: change.text})]
        signed = signature(self._turn.service.signing, change.text) if change.kind == "thinking" else ""
        self.content.append(_block(change, change.text, signed))
        stop = self._event("stop", change)
        if not signed:
            return [stop]
        return [self._event("delta", change, delta={"type": "signature_delta", "signature": signed}), stop]

    def _event(self, kind: str, change: Change, **fields: Any) -> dict[str, Any]:
        return {"type": f"content_block_{kind}", "index": change.index, **fields}


_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _block(change: Opened | Closed, text: str, signed: str) -> dict[str, Any]:
    """A content block, or how it begins if there is no text yet."""
    if change.kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": signed}
    if change.call is None:
        return {"type": "text", "text": text, "citations": None}
    call = change.call
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(text or "{}")}


async def whole(turn: Turn, asked: Asked) -> AsyncIterator[dict[str, Any] | None]:
    """None once the request is accepted, then the answer.

    Raises:
        InputError: the request cannot be done.
        ApiError: generation failed or was interrupted.
    """
    answer = _Answer(turn)
    async with aclosing(turn.events()) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Accepted):
                yield None
            else:
                answer.add(event)
    yield answer.message(answer.usage)


async def stream(turn: Turn, asked: Asked) -> AsyncIterator[bytes]:
    """The answer as events.

    A comment comes when the request is accepted; what is refused is raised before it. An error after that is an
    event of its own, and the stream ends.
    """
    answer = _Answer(turn)
    accepted = False
    try:
        async with aclosing(turn.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Accepted):
                    accepted = True
                    yield sse.COMMENT
                    continue
                for made in answer.add(event):
                    yield sse.event(made)
    except AbyssalError as error:
        if not accepted:
            raise
        yield sse.event(api_error(error).anthropic(turn.id))
