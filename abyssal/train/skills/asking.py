"""Conversations put to a completer, as a server puts them: prompt format, grammar, parser; greedy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from abyssal.base.errors import RunError
from abyssal.base.progress import Progress
from abyssal.chat.api import (
    CallMade,
    ChatRequest,
    Completer,
    Finished,
    FinishReason,
    ReasoningDelta,
    Repaired,
    Sampling,
    TextDelta,
    Usage,
)
from abyssal.chat.turn import answer
from abyssal.encoding.messages import Conversation
from abyssal.train.conversations import MODES
from abyssal.train.data.example import Message, ThinkingMode
from abyssal.train.skills.journal import Journal
from abyssal.train.skills.rates import Row

AT_ONCE = 64  # requests: the engine has so many slots
GREEDY = Sampling(temperature=0.0)
T = TypeVar("T", bound="Item")


@dataclass
class Reply:
    """What a model said in one turn.

    Attributes:
        calls: names and JSON arguments, in order.
        repairs: what of its form the parser had to mend, `encoding.parse.Repair.name`.
        tokens: of all it said, of which `reasoning_tokens` were thinking.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    finish: FinishReason = "failed"
    tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def text(self) -> str:
        """The content of an answer that is nothing else and came to its end; otherwise empty."""
        return self.content if self.finish == "stop" and not self.calls and not self.repairs else ""

    def to_json(self) -> dict[str, Any]:
        """For a journal; empty parts are left out."""
        parts = {"content": self.content, "reasoning": self.reasoning, "calls": self.calls, "repairs": self.repairs}
        kept = {name: value for name, value in parts.items() if value}
        return {**kept, "finish": self.finish, "tokens": self.tokens, "reasoning_tokens": self.reasoning_tokens}


async def ask(
    completer: Completer,
    messages: Sequence[Message],
    mode: ThinkingMode,
    most: int,
    tools: Sequence[dict[str, Any]] = (),
    *,
    bound: bool = True,
) -> Reply:
    """The next turn of a conversation.

    Args:
        completer: the model.
        messages: in OpenAI's form.
        mode: how much to think.
        most: tokens of the answer, thinking included.
        tools: in OpenAI's form.
        bound: hold calls to their grammar.
    Raises:
        InputError: the request cannot be done.
        RunError: the engine failed.
    """
    thinking, effort = MODES[mode]
    request = ChatRequest(
        messages=Conversation.from_json(list(messages), list(tools) or None).messages,
        thinking=thinking,
        effort=effort,
        max_tokens=most,
        sampling=GREEDY,
    )
    reply = Reply()
    async for event in answer(completer, request, bound=bound):
        if isinstance(event, TextDelta):
            reply.content += event.text
        elif isinstance(event, ReasoningDelta):
            reply.reasoning += event.text
        elif isinstance(event, CallMade):
            reply.calls.append((event.name, event.arguments))
        elif isinstance(event, Repaired):
            reply.repairs.append(event.name)
        elif isinstance(event, Finished):
            reply.finish = event.reason
            if event.reason in ("failed", "interrupted"):
                raise RunError(f"the engine did not finish an answer ({event.error or event.reason}): score again")
        elif isinstance(event, Usage):
            reply.tokens, reply.reasoning_tokens = event.completion, event.reasoning
    return reply


class Item(Protocol):
    """Something to be asked."""

    @property
    def id(self) -> str:
        """Its name in the journal."""


@dataclass(frozen=True)
class Bench:
    """What every suite needs.

    Attributes:
        completer: the model.
        journal: what has been done.
        silent: show no progress.
    """

    completer: Completer
    journal: Journal
    silent: bool = False

    def rows(
        self,
        label: str,
        items: Iterable[T],
        judge: Callable[[T], Awaitable[Row]],
        at_once: int = AT_ONCE,
    ) -> list[Row]:
        """The rows of all items, in their order: those that the journal has, and the others asked now.

        Args:
            label: of the progress.
            items: what to ask.
            judge: asks one and says what came of it; the id is added.
            at_once: how many are under way together.
        """
        asked = list(items)
        waiting = [item for item in asked if self.journal.get(item.id) is None]
        if waiting:
            asyncio.run(self._all(label, waiting, judge, at_once))
        found = [self.journal.get(item.id) for item in asked]
        return [row for row in found if row is not None]

    async def _all(self, label: str, items: Sequence[T], judge: Callable[[T], Awaitable[Row]], at_once: int) -> None:
        free = asyncio.Semaphore(at_once)
        with Progress(len(items), "items", label, silent=self.silent) as progress:

            async def one(item: T) -> None:
                async with free:
                    row = await judge(item)
                self.journal.add({"id": item.id, **row})
                progress.advance()

            tasks = [asyncio.create_task(one(item)) for item in items]
            try:
                await asyncio.gather(*tasks)
            finally:  # one that failed ends the others
                for task in tasks:
                    task.cancel()
