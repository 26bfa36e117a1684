"""OpenAI Responses over chat events (api.md 6)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import (
    Accepted,
    CallMade,
    ChatEvent,
    ChatRequest,
    Finished,
    ReasoningDelta,
    Sampling,
    TokenInfo,
    TokensRead,
    Usage,
)
from abyssal.encoding.literals import EOS, THINK_END
from abyssal.encoding.messages import text_of
from abyssal.server import sse
from abyssal.server.blocks import Blocks, Change, Closed, Grown, Opened
from abyssal.server.errors import ApiError, api_error
from abyssal.server.fields import checked, conversation, effort_of, format_of, given, refuse
from abyssal.server.names import Named, resolve
from abyssal.server.openai import logprob_of, tool_choice
from abyssal.server.service import Service

REFUSED = ("background", "conversation", "prompt")
LOGPROBS = "message.output_text.logprobs"  # the name in `include`
FUNCTION = ("name", "description", "parameters", "strict")  # what the model sees of a tool
RESPONSES = 4096
CHARACTERS = 64 << 20


class _Reasoning(BaseModel):
    effort: str | None = None


class _Text(BaseModel):
    format: dict[str, Any] | None = None


class ResponsesBody(BaseModel):
    """The fields of a request that we know; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: _Reasoning | None = None
    allow_effort_fallback: bool | None = None
    text: _Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["disabled"] | None = None
    stream: bool | None = None


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        body: its fields.
        items: its input.
        named: what its model name means.
    """

    body: ResponsesBody
    items: tuple[dict[str, Any], ...]
    named: Named

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.stream)


def asked(data: Any, service: Service) -> Asked:
    """Check a request.

    Raises:
        ApiError: 400 for a malformed body or a field that is not supported, 404 for an unknown model, 422 for a
            value out of range.
    """
    refuse(data, REFUSED)
    body = checked(ResponsesBody, data)
    named = resolve(body.model, service.completer.model, legacy=service.settings.legacy_names)
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    return Asked(body, tuple(items), named)


class Memory:
    """The items of past responses, of each caller; the longest unused are forgotten.

    Args:
        count: most responses that are kept.
        characters: most characters of their items.
    """

    def __init__(self, count: int = RESPONSES, characters: int = CHARACTERS):
        self._count, self._left = count, characters
        self._kept: OrderedDict[tuple[str, str], tuple[tuple[dict[str, Any], ...], int]] = OrderedDict()

    def keep(self, caller: str, name: str, items: tuple[dict[str, Any], ...]) -> None:
        """Remember a response by its id: the conversation that led to it, and its output."""
        size = len(sse.compact(items))
        self._kept[caller, name] = items, size
        self._left -= size
        while self._kept and (self._left < 0 or len(self._kept) > self._count):
            _, (_, forgotten) = self._kept.popitem(last=False)
            self._left += forgotten

    def recall(self, caller: str, name: str) -> tuple[dict[str, Any], ...]:
        """The items of a response.

        Raises:
            ApiError: 400, this caller has none of this id.
        """
        if (caller, name) not in self._kept:
            text = f"Previous response with id {name!r} not found: send its items as input"
            raise ApiError(400, text, param="previous_response_id", code="previous_response_not_found")
        self._kept.move_to_end((caller, name))
        return self._kept[caller, name][0]


class Run:
    """A response on its way: a turn, and what is remembered of it.

    Attributes:
        turn: the turn.
        id: names it in headers and logs.
        notes, repaired: the turn's.
        items: the conversation that it answers.
    Raises:
        ApiError, InputError: the request cannot be done.
    """

    def __init__(self, asked: Asked, service: Service, memory: Memory, caller: str):
        body = asked.body
        self.body, self._memory, self._caller = body, memory, caller
        previous = body.previous_response_id
        before = memory.recall(caller, previous) if previous is not None else ()
        self.items = (*before, *asked.items)
        self.tools = [_function(tool, f"tools.{i}") for i, tool in enumerate(body.tools or ())]
        self.turn = service.turn(self._request(asked.named, len(before)), caller, "/v1/responses")
        self.id, self.notes, self.repaired = self.turn.id, self.turn.notes, self.turn.repaired
        self.created = int(time.time())

    def _request(self, named: Named, before: int) -> ChatRequest:
        body = self.body
        effort = body.reasoning.effort if body.reasoning is not None else None
        thinks = named.thinking if effort is None else effort != "none"
        form = format_of(self._format, "text.format")
        mode, name = tool_choice(body.tool_choice)
        messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
        messages += [_message(item, f"input.{i - before}") for i, item in enumerate(self.items)]
        request = ChatRequest(
            messages=conversation(messages, [{"function": tool} for tool in self.tools], form.in_prompt),
            thinking=thinks,
            effort=effort_of(effort, "reasoning.effort") if thinks else None,
            allow_effort_fallback=bool(body.allow_effort_fallback),
            max_tokens=body.max_output_tokens,
            sampling=Sampling(**given(body, "temperature", "top_p")),
            tool_mode=mode,
            tool_name=name,
            parallel_calls=body.parallel_tool_calls is not False,
            schema=form.schema,
            schema_strict=form.strict,
            top_logprobs=(body.top_logprobs or 0) if body.top_logprobs or LOGPROBS in (body.include or ()) else None,
        )
        if request.messages[-1].role == "assistant":
            raise ApiError(400, "the input ends with the model's own: add a message, or a call's output", param="input")
        return request

    @property
    def _format(self) -> dict[str, Any] | None:
        return self.body.text.format if self.body.text is not None else None

    def response(self, status: str, output: Sequence[dict[str, Any]] = (), **fields: Any) -> dict[str, Any]:
        """The response object; `fields` are those that change on the way."""
        body, request = self.body, self.turn.request
        form = {"type": "text", **(self._format or {})}
        if form["type"] == "json_schema":
            form = {"name": "answer", **form.get("json_schema", form), "type": "json_schema"}
        named = {"type": "function", "name": request.tool_name}
        return {
            "id": f"resp_{self.id[4:]}",
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self.turn.completer.model,
            "output": list(output),
            "parallel_tool_calls": request.parallel_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": request.effort if request.thinking else "none", "summary": None},
            "store": body.store is not False,
            "temperature": request.sampling.temperature,
            "text": {"format": form},
            "tool_choice": request.tool_mode if request.tool_name is None else named,
            "tools": [{"type": "function", **tool} for tool in self.tools],
            "top_logprobs": request.top_logprobs,
            "top_p": request.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            **fields,
        }

    def remember(self, output: Sequence[dict[str, Any]]) -> None:
        """Let later requests go on from this response, unless this one asked not to."""
        if self.body.store is not False:
            self._memory.keep(self._caller, f"resp_{self.id[4:]}", (*self.items, *output))


def _function(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The function object of a tool, in the flat form or Chat's nested one."""
    if tool.get("type", "function") != "function":
        text = f"{where}: the tool {tool['type']} is not offered here: use functions"
        raise ApiError(400, text, param=where, code="unsupported_parameter")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}: the function has no name: give one", param=f"{where}.name")
    return {key: value for key, value in function.items() if key in FUNCTION and value is not None}


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An item of the input as a message in Chat's form; what makes up one answer is joined later."""
    kind = item.get("type") or "message"
    if kind == "message":
        role, content = item.get("role"), item.get("content")
        if role not in ("user", "assistant", "system", "developer"):
            raise ApiError(400, f"{where}: role {role!r} is unknown: use user, assistant or developer", param=where)
        # here developer means what system does; the prompt format's own developer role is dropped with old reasoning
        role = "system" if role == "developer" else role
        return {"role": role, "content": text_of(content, role)}
    if kind == "reasoning":
        texts = _texts(item.get("content")) or _texts(item.get("summary"))
        return {"role": "assistant", "reasoning_content": "\n\n".join(texts) if texts else None}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text_of(item.get("output"), "tool")}
    text = f"{where}: an item of type {kind!r} is not supported: leave it out"
    raise ApiError(400, text, param=where, code="unsupported_parameter")


def _texts(parts: Any) -> list[str]:
    """The texts of reasoning; none if it was withheld or encrypted."""
    listed = parts if isinstance(parts, list) else ()
    return [str(part.get("text") or "") for part in listed if isinstance(part, Mapping)]


def usage_of(usage: Usage) -> dict[str, Any]:
    """The usage object."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


class _Output:
    """The output of a response as it grows.

    Attributes:
        items: those that are over.
        final: the response object, once all is over.
    """

    def __init__(self, run: Run):
        self.items: list[dict[str, Any]] = []
        self.final: dict[str, Any] | None = None
        self._run = run
        self._blocks = Blocks(run.turn.request)
        self._status = "completed"
        special = run.turn.completer.special
        self._marks = (special(THINK_END), special(EOS))
        self._pending: list[TokenInfo] = []  # tokens whose text has not come yet
        self._logprobs: list[dict[str, Any]] = []

    def add(self, event: ChatEvent) -> list[dict[str, Any]]:
        """The stream's events for an event of the turn, without their numbers.

        Raises:
            ApiError: generation failed or was interrupted.
        """
        run = self._run
        if isinstance(event, Accepted):
            begun = run.response("in_progress")
            return [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]
        if isinstance(event, Usage):
            details = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
            self.final = run.response(self._status, self.items, usage=usage_of(event), incomplete_details=details)
            run.remember(self.items)
            return [{"type": f"response.{self._status}", "response": self.final}]
        if isinstance(event, TokensRead) and run.turn.request.top_logprobs is not None:
            self._pending += [info for info in event.tokens if info.token not in self._marks]
        elif isinstance(event, ReasoningDelta | CallMade):
            self._pending.clear()
        elif isinstance(event, Finished) and event.reason == "length":
            self._status = "incomplete"
        return [made for change in self._blocks.add(event) for made in self._changed(change)]

    def _changed(self, change: Change) -> list[dict[str, Any]]:
        if isinstance(change, Opened):
            self._logprobs = []
            item = self._item(change, "in_progress", None)
            added = self._event("output_item.added", change, item=item)
            return [added] if change.kind == "call" else [added, self._part("added", change, "")]
        if isinstance(change, Grown):
            fields: dict[str, Any] = {"delta": change.text}
            if change.kind == "text":
                fields["logprobs"] = self._taken()
            return [self._about(change, "delta", **fields)]
        self.items.append(self._item(change, "incomplete" if change.cut else "completed", change.text))
        over = self._event("output_item.done", change, item=self.items[-1])
        if change.call is not None:
            done = {"name": change.call.name, "arguments": change.text}
            return [self._about(change, "done", **done), over]
        fields = {"text": change.text} | ({"logprobs": self._logprobs} if change.kind == "text" else {})
        return [self._about(change, "done", **fields), self._part("done", change, change.text), over]

    def _taken(self) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens whose text came now."""
        turn = self._run.turn
        made = [logprob_of(turn.completer, info, turn.request.top_logprobs or 0) for info in self._pending]
        self._pending.clear()
        self._logprobs += made
        return made

    def _event(self, kind: str, change: Change, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "output_index": change.index, **fields}

    def _about(self, change: Change, stage: str, **fields: Any) -> dict[str, Any]:
        """An event about the text of an item."""
        place = {} if change.kind == "call" else {"content_index": 0}
        return self._event(f"{_TEXTS[change.kind]}.{stage}", change, item_id=self._id(change), **place, **fields)

    def _part(self, stage: str, change: Opened | Closed, text: str) -> dict[str, Any]:
        return self._event(f"content_part.{stage}", change, item_id=self._id(change), content_index=0,
                           part=self._content(change, text))  # fmt: skip

    def _content(self, change: Opened | Closed, text: str) -> dict[str, Any]:
        if change.kind == "thinking":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _id(self, change: Change) -> str:
        return f"{_PREFIXES[change.kind]}_{self._run.id[4:]}_{change.index}"

    def _item(self, change: Opened | Closed, status: str, text: str | None) -> dict[str, Any]:
        """An output item; its text is None as long as it has no part for it."""
        head = {"id": self._id(change), "status": status}
        if change.call is not None:
            call = change.call
            return {**head, "type": "function_call", "call_id": call.id, "name": call.name, "arguments": text or ""}
        content = [] if text is None else [self._content(change, text)]
        if change.kind == "thinking":
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}


_TEXTS = {"thinking": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}
_PREFIXES = {"thinking": "rs", "text": "msg", "call": "fc"}


async def whole(run: Run, asked: Asked) -> AsyncIterator[dict[str, Any] | None]:
    """None once the request is accepted, then the answer.

    Raises:
        InputError: the request cannot be done.
        ApiError: generation failed or was interrupted.
    """
    output = _Output(run)
    async with aclosing(run.turn.events()) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, Accepted):
                yield None
            else:
                output.add(event)
    yield output.final


async def stream(run: Run, asked: Asked) -> AsyncIterator[bytes]:
    """The answer as numbered events.

    The first comes when the request is accepted; what is refused is raised before it. After an error the response
    is told as failed, and the stream ends.
    """
    output = _Output(run)
    number = 0
    try:
        async with aclosing(run.turn.events()) as events:  # type: ignore[type-var]
            async for event in events:
                for made in output.add(event):
                    yield sse.event({**made, "sequence_number": number})
                    number += 1
    except AbyssalError as error:
        if not number:
            raise
        told = {"code": "server_error", "message": str(api_error(error))}
        failed = run.response("failed", output.items, error=told)
        yield sse.event({"type": "response.failed", "response": failed, "sequence_number": number})
