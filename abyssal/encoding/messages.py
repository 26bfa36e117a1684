"""A conversation: messages, tools and tool calls, read from the JSON that clients send."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from abyssal.base.errors import InputError
from abyssal.encoding.literals import TASKS

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant made.

    Attributes:
        name: of the function.
        arguments: JSON text of its arguments; anything else is rendered as one string.
        id: what the result refers to.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class ToolResult:
    """What a tool returned for a call."""

    id: str
    text: str


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        blocks: parts of a user message after preparation, texts and tool results in order.
        reasoning: an assistant's thinking, or None if it is not known.
        tool_calls: an assistant's calls.
        tool_call_id: the call that a tool message answers.
        tools: function objects that this message defines, in order.
        response_format: JSON schema that it asks for.
        task: one of the quick tasks, or None.
        prefix: an assistant's last message that the answer continues; it gets no end token.
    """

    role: str
    content: str = ""
    blocks: tuple[str | ToolResult, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    prefix: bool = False

    @classmethod
    def from_dict(cls, data: Any) -> Message:
        """A message in OpenAI's form, with the fields that V4 adds.

        Raises:
            InputError: it is none; the text names the field.
        """
        if not isinstance(data, Mapping):
            raise InputError(f"a message is {type(data).__name__}: give an object with role and content")
        role = data.get("role")
        if role not in ROLES:
            raise InputError(f"role {role!r} is unknown: use {', '.join(ROLES)}")
        task = data.get("task")
        if task is not None and task not in TASKS:
            raise InputError(f"task {task!r} is unknown: use {', '.join(TASKS)}")
        reasoning = data.get("reasoning_content")
        reasoning = data.get("reasoning") if reasoning is None else reasoning
        if reasoning is not None and not isinstance(reasoning, str):
            raise InputError(f"reasoning_content is {type(reasoning).__name__}: give text")
        return cls(
            role=role,
            content=text_of(data.get("content"), role),
            reasoning=reasoning,
            tool_calls=tuple(_call(call) for call in _list(data, "tool_calls")),
            tool_call_id=str(data.get("tool_call_id") or ""),
            tools=tuple(function_of(tool) for tool in _list(data, "tools")),
            response_format=data.get("response_format"),
            task=task,
            prefix=bool(data.get("prefix") or data.get("wo_eos")),
        )


def _list(data: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = data.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InputError(f"{name} is {type(value).__name__}: give a list")
    return value


def text_of(content: Any, role: str) -> str:
    """The text of a content field: a string, null, or a list of parts.

    Text parts are joined by a blank line; in a tool's result other parts become "[Unsupported TYPE]".

    Raises:
        InputError: another kind of content, or a part that we cannot read, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"content is {type(content).__name__}: give text or a list of parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and kind in ("text", "input_text", "output_text"):
            if not isinstance(part.get("text"), str):
                raise InputError("a text part has no text: give it one")
            texts.append(part["text"])
        elif role == "tool":
            texts.append(f"[Unsupported {kind}]")
        else:
            raise InputError(f"content part of type {kind!r} is not supported: give text parts")
    return "\n\n".join(texts)


def _call(data: Any) -> ToolCall:
    function = data.get("function") if isinstance(data, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError("a tool call has no function with a name: give function.name and function.arguments")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):  # some clients send the object instead of its text
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], arguments, str(data.get("id") or ""))


def function_of(tool: Any) -> Mapping[str, Any]:
    """The function object of a tool, in OpenAI's nested or flat form.

    Raises:
        InputError: it is no function, or has no name.
    """
    if isinstance(tool, Mapping):
        function = tool.get("function", tool if "name" in tool else None)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]:
            return function
        if tool.get("type") not in (None, "function"):
            raise InputError(f"tool type {tool['type']!r} is not supported: use function")
    raise InputError("a tool has no function with a name: give function.name")


def prepared(messages: Sequence[Message]) -> list[Message]:
    """Tool results become blocks of user messages, which collect (encoding.md 2, points 1 to 3)."""
    collected: list[Message] = []
    for message in messages:
        if message.role not in ("user", "tool"):
            collected.append(message)
            continue
        block = ToolResult(message.tool_call_id, message.content) if message.role == "tool" else message.content
        last = collected[-1] if collected else None
        if last is not None and last.role == "user" and last.task is None:
            collected[-1] = replace(last, blocks=(*last.blocks, block), task=message.task)
        else:
            collected.append(replace(message, role="user", blocks=(block,)))
    order: dict[str, int] = {}
    for i, message in enumerate(collected):
        if message.role == "assistant" and message.tool_calls:
            order = {call.id: n for n, call in enumerate(message.tool_calls) if call.id}
        elif message.role == "user":
            collected[i] = replace(message, blocks=_sorted(message.blocks, order))
    return collected


def _sorted(blocks: tuple[str | ToolResult, ...], order: Mapping[str, int]) -> tuple[str | ToolResult, ...]:
    """Tool results in the order of their calls; texts keep their places."""
    results = sorted((b for b in blocks if isinstance(b, ToolResult)), key=lambda b: order.get(b.id, 0))
    following = iter(results)
    return tuple(next(following) if isinstance(b, ToolResult) else b for b in blocks)


@dataclass(frozen=True)
class Conversation:
    """Messages and what applies to all of them.

    Attributes:
        messages: in order.
        tools: all function objects that are defined, in order.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=())

    @classmethod
    def from_json(cls, messages: Any, tools: Any = None, response_format: Any = None) -> Conversation:
        """Read messages, and what is given beside them; that goes to the first system message.

        Args:
            messages: in OpenAI's form.
            tools: a list of tools, or None.
            response_format: JSON schema that the prompt shows, or None.
        Raises:
            InputError: something is malformed.
        """
        if not isinstance(messages, list) or not messages:
            raise InputError("messages are no list or empty: give at least one message")
        read = [Message.from_dict(message) for message in messages]
        if tools is not None and not isinstance(tools, list):
            raise InputError(f"tools are {type(tools).__name__}: give a list")
        functions = tuple(function_of(tool) for tool in tools or ())
        if functions or response_format is not None:
            at = next((i for i, m in enumerate(read) if m.role == "system"), None)
            if at is None:
                at = 0
                read.insert(0, Message("system"))
            shown = response_format if response_format is not None else read[at].response_format
            read[at] = replace(read[at], tools=(*read[at].tools, *functions), response_format=shown)
        return cls(tuple(read), tuple(tool for message in read for tool in message.tools))
