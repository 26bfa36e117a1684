"""What the trace page shows: the exact prompt tokens, the sampled ones, and the blocks that were chosen.

Kept in memory alone, for the last few requests, and shown to the caller that made them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from abyssal.chat.api import (
    ChatEvent,
    ChatRequest,
    Completer,
    Finished,
    PromptUse,
    Repaired,
    TokenInfo,
    TokensRead,
)
from abyssal.encoding.literals import THINK_END

CSA_RATIO = 4  # tokens of a block that the indexer chooses
BLOCK_TOKENS = 4096  # last sampled tokens of an answer whose blocks are kept


@dataclass
class _Answer:
    tokens: list[TokenInfo] = field(default_factory=list)
    repairs: list[dict[str, str]] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Trace:
    """One request.

    Attributes:
        id: the request's id, which the answer names in `x-request-id`.
        caller: who may see it.
        route: the path that was called.
        request: what was asked.
    """

    id: str
    caller: str
    route: str
    request: ChatRequest
    created: float = field(default_factory=time.time)
    prompt: PromptUse = field(default_factory=lambda: PromptUse(0, 0))
    first_token_s: float | None = None
    seconds: float = 0.0
    answers: dict[int, _Answer] = field(default_factory=dict)

    def add(self, event: ChatEvent, seconds: float) -> None:
        """Take an event in, `seconds` after the request came."""
        self.seconds = seconds
        if isinstance(event, TokensRead):
            answer = self._answer(event.choice)
            if self.first_token_s is None:
                self.first_token_s = seconds
            answer.tokens += event.tokens
            old = len(answer.tokens) - BLOCK_TOKENS
            if old > 0 and answer.tokens[old - 1].blocks:
                info = answer.tokens[old - 1]
                answer.tokens[old - 1] = TokenInfo(info.token, info.logprob, info.top)
        elif isinstance(event, Repaired):
            self._answer(event.choice).repairs.append({"name": event.name, "detail": event.detail})
        elif isinstance(event, Finished):
            self._answer(event.choice).finish = event.reason
        elif isinstance(event, PromptUse):
            self.prompt = event

    def _answer(self, choice: int) -> _Answer:
        found = self.answers.get(choice)
        if found is None:
            found = self.answers[choice] = _Answer()
        return found

    def summary(self, model: str) -> dict[str, Any]:
        """One line of the list."""
        return {
            "id": self.id,
            "created": self.created,
            "route": self.route,
            "model": model,
            "prompt_tokens": self.prompt.tokens,
            "cached_tokens": self.prompt.cached,
            "completion_tokens": sum(len(answer.tokens) for answer in self.answers.values()),
            "finish_reason": next((answer.finish for answer in self.answers.values()), None),
            "seconds": self.seconds,
        }

    def whole(self, completer: Completer) -> dict[str, Any]:
        """All of it."""
        end = completer.special(THINK_END)

        def text(token: int) -> str:
            return completer.token_bytes(token).decode(errors="replace")

        def tokens(answer: _Answer) -> list[dict[str, Any]]:
            shown, kind = [], "reasoning" if self.request.answer_thinks else "content"
            for info in answer.tokens:
                top = [[token, text(token), logprob] for token, logprob in info.top]
                shown.append(
                    {"id": info.token, "text": text(info.token), "logprob": info.logprob, "kind": kind, "top": top,
                     "blocks": [list(blocks) for blocks in info.blocks]}
                )  # fmt: skip
                if info.token == end:
                    kind = "content"
            return shown

        return {
            **self.summary(completer.model),
            "snapshot": completer.snapshot,
            "context": completer.context,
            "thinking": self.request.thinking,
            "effort": self.request.effort,
            "ratio": CSA_RATIO,
            "prompt": {
                "tokens": self.prompt.tokens,
                "cached": self.prompt.cached,
                "reason": self.prompt.reason,
                "ids": list(self.prompt.ids),
                "texts": [text(token) for token in self.prompt.ids],
            },
            "answers": [
                {"choice": choice, "finish_reason": answer.finish, "repairs": answer.repairs, "tokens": tokens(answer)}
                for choice, answer in sorted(self.answers.items())
            ],
            "first_token_s": self.first_token_s,
        }


class Traces:
    """The last few requests.

    Args:
        count: how many.
    """

    def __init__(self, count: int):
        self._count = count
        self._kept: OrderedDict[str, Trace] = OrderedDict()

    @property
    def wanted(self) -> bool:
        """Whether any are kept."""
        return self._count > 0

    def keep(self, trace: Trace) -> None:
        """Keep one more, and drop the oldest."""
        self._kept[trace.id] = trace
        while len(self._kept) > self._count:
            self._kept.popitem(last=False)

    def of(self, caller: str) -> list[Trace]:
        """Those of a caller, newest first."""
        return [trace for trace in reversed(self._kept.values()) if trace.caller == caller]

    def get(self, trace: str, caller: str) -> Trace | None:
        """One of a caller's, or None."""
        found = self._kept.get(trace)
        return found if found is not None and found.caller == caller else None
