"""Reasoning that clients do not send back: remembered by tool call, restored, or refused (api.md 3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from abyssal.encoding.messages import Message
from abyssal.server.errors import ApiError

CHARACTERS = 64 << 20
MISSING = "The `reasoning_content` in the thinking mode must be passed back to the API."


class ReasoningMemory:
    """The reasoning that led to each tool call, of each caller; the oldest is forgotten.

    Args:
        characters: most characters of reasoning that are kept.
    """

    def __init__(self, characters: int = CHARACTERS):
        self._left = characters
        self._kept: OrderedDict[tuple[str, str], str] = OrderedDict()

    def remember(self, caller: str, calls: Sequence[str], reasoning: str) -> None:
        """Keep the reasoning of an answer that made these calls."""
        for call in calls:
            self._kept[caller, call] = reasoning
            self._left -= len(reasoning)
        while self._left < 0 and self._kept:
            _, old = self._kept.popitem(last=False)
            self._left += len(old)

    def recall(self, caller: str, calls: Sequence[str]) -> str | None:
        """The reasoning that led to one of these calls, or None."""
        return next((kept for call in calls if (kept := self._kept.get((caller, call))) is not None), None)

    def restored(
        self, messages: Sequence[Message], caller: str, *, strict: bool
    ) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        """Answers with the reasoning that the client left out, and what was repaired.

        Args:
            messages: of a request in thinking mode that has tools in play.
            strict: refuse instead.
        Raises:
            ApiError: the vendor's 400, if strict.
        """
        whole: list[Message] = []
        repaired: list[str] = []
        for i, message in enumerate(messages):
            if message.role == "assistant" and message.reasoning is None and not message.prefix:
                if strict:
                    raise ApiError(400, MISSING, param=f"messages.{i}.reasoning_content")
                found = self.recall(caller, [call.id for call in message.tool_calls])
                repaired.append("empty_reasoning" if found is None else "restored_reasoning")
                message = replace(message, reasoning=found or "")
            whole.append(message)
        return tuple(whole), tuple(repaired)
