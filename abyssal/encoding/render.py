"""Messages to prompt, byte for byte as the official encoder (encoding.md 2 and 3).

A prompt is a list of pieces: only what the template writes may become special tokens, so nobody can forge a
turn by typing its marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from abyssal.base.errors import InputError
from abyssal.encoding import dsml
from abyssal.encoding.literals import (
    ASSISTANT,
    BOS,
    EOS,
    LATEST_REMINDER,
    SPECIAL_TOKENS,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)
from abyssal.encoding.messages import Message, ToolResult, prepared
from abyssal.encoding.snapshots import EFFORT_TEXT, Effort, Snapshot
from abyssal.encoding.tokenizer import Piece

_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


class _Prompt:
    """Pieces in order; neighbouring text is one piece, since a tokenizer joins across borders."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def text(self, text: str) -> None:
        """A caller's words."""
        if text and self.pieces and not self.pieces[-1].special:
            self.pieces[-1] = Piece(self.pieces[-1].text + text)
        elif text:
            self.pieces.append(Piece(text))

    def template(self, text: str) -> None:
        """Words of the template, in which special tokens are meant."""
        for part in _SPECIAL.split(text):
            if part in SPECIAL_TOKENS:
                self.pieces.append(Piece(part, special=True))
            else:
                self.text(part)


def render(
    messages: Sequence[Message],
    *,
    thinking: bool,
    snapshot: Snapshot = "april",
    effort: Effort | None = None,
) -> list[Piece]:
    """The prompt that asks for the next answer.

    Args:
        messages: the conversation.
        thinking: thinking mode; otherwise chat mode (Non-think).
        snapshot: April or 0731 (also for 0813), which differ in efforts.
        effort: how much to think; None for the snapshot's default.
    Raises:
        InputError: there is no message, or a developer message is empty.
    """
    if not messages:
        raise InputError("there are no messages: give at least one")
    ready = prepared(messages)
    keep = not thinking or any(message.tools for message in ready)
    if not keep:
        ready = _without_old_reasoning(ready)
    last_asked = _last_asked(ready)
    prompt = _Prompt()
    prompt.template(BOS)
    if thinking:
        prompt.text(EFFORT_TEXT[snapshot][effort])
    for i, message in enumerate(ready):
        before = ready[i - 1] if i else None
        after = ready[i + 1] if i + 1 < len(ready) else None
        thinks = thinking and (keep or i > last_asked) and not (before is not None and before.task)
        _message(prompt, message, thinks)
        if after is None or after.role in ("assistant", "latest_reminder"):
            _opening(prompt, message, thinking and (keep or i >= last_asked), thinking)
    return prompt.pieces


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The prompt as one text, for people and for comparison; encode the pieces instead."""
    return "".join(piece.text for piece in pieces)


def _last_asked(messages: Sequence[Message]) -> int:
    return max((i for i, m in enumerate(messages) if m.role in ("user", "developer")), default=-1)


def _without_old_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Before the last question, answers lose their reasoning and developer messages vanish."""
    last = _last_asked(messages)
    return [
        replace(message, reasoning=None) if i < last else message
        for i, message in enumerate(messages)
        if i >= last or message.role != "developer"
    ]


def _message(prompt: _Prompt, message: Message, thinks: bool) -> None:
    if message.role in ("system", "developer"):
        if message.role == "developer":
            if not message.content:
                raise InputError("a developer message is empty: give it content")
            prompt.template(USER)
        prompt.text(message.content)
        _appendices(prompt, message)
    elif message.role == "user":
        prompt.template(USER)
        for i, block in enumerate(message.blocks):
            prompt.text("\n\n" if i else "")
            prompt.text(f"<tool_result>{block.text}</tool_result>" if isinstance(block, ToolResult) else block)
    elif message.role == "latest_reminder":
        prompt.template(LATEST_REMINDER)
        prompt.text(message.content)
    else:
        if thinks:
            prompt.text(message.reasoning or "")
            prompt.template(THINK_END)
        prompt.text(message.content)
        for text, own in dsml.calls(message.tool_calls) if message.tool_calls else ():
            (prompt.text if own else prompt.template)(text)
        if not message.prefix:
            prompt.template(EOS)


def _appendices(prompt: _Prompt, message: Message) -> None:
    if message.tools:
        before, schemas, after = dsml.tools_section(message.tools)
        prompt.template("\n\n" + before)
        prompt.text(schemas)
        prompt.template(after)
    if message.response_format is not None:
        prompt.text("\n\n" + _FORMAT + dsml.as_json(message.response_format))


def _opening(prompt: _Prompt, message: Message, thinks: bool, thinking: bool) -> None:
    """What opens the answer behind a message."""
    if message.task == "action":
        prompt.template(ASSISTANT + (THINK_START if thinking else THINK_END) + TASKS["action"])
    elif message.task:
        prompt.template(TASKS[message.task])
    elif message.role in ("user", "developer"):
        prompt.template(ASSISTANT + (THINK_START if thinks else THINK_END))
