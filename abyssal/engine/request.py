"""What a caller asks of the engine, and what it gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from abyssal.base.errors import InputError
from abyssal.engine.grammar import Grammar
from abyssal.engine.sampler import Sampling

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Tokens to continue.

    Attributes:
        prompt: token ids.
        max_tokens: most tokens to generate; cut to what the context leaves.
        sampling: how tokens are chosen.
        stop: ids that end the answer; the one that does is its last token.
        stop_strings: texts that end the answer wherever they lie across tokens.
        n: answers to one prompt, which is read once.
        top_logprobs: how many of the likeliest tokens to report beside each chosen one.
        grammar: what the answer must match, or None.
        grammar_after: ids that must have come, in this order, before the grammar holds; none: from the start.
        close: a token and a number: where the answer has so many tokens without it, it comes next.
        score_prompt: report the log-probabilities of the prompt's own tokens; nothing is reused then.
        trace: report which blocks the indexers chose for each token.
        drafts: tokens that the MTP block drafts for each step, 0 for none; the answer is the same.

    Raises:
        InputError: a number is out of range or limits contradict each other.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int = 0
    grammar: Grammar | None = None
    grammar_after: tuple[int, ...] = ()
    close: tuple[int, int] | None = None
    score_prompt: bool = False
    trace: bool = False
    drafts: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}: give at least 1")
        if not 1 <= self.n <= 128:
            raise InputError(f"n is {self.n}: use 1 to 128")
        if not 0 <= self.top_logprobs <= 100:
            raise InputError(f"top_logprobs is {self.top_logprobs}: use 0 to 100")
        if not 0 <= self.drafts <= 8:
            raise InputError(f"drafts is {self.drafts}: use 0 to 8")
        if any(not text for text in self.stop_strings):
            raise InputError("a stop string is empty: leave it out")
        if self.close is not None and self.close[1] < 0:
            raise InputError(f"close holds {self.close[1]} tokens: give 0 or more")
        if self.grammar_after and self.grammar is None:
            raise InputError("grammar_after is given without a grammar: give both or neither")


@dataclass(frozen=True)
class PrefixUse:
    """What a prompt found in the prefix cache.

    Attributes:
        hit: tokens whose entries were reused.
        recomputed: of these, tokens that were read again to fill the window; their entries were reused still.
        miss: tokens that were new.
        reason: why it was no more: in words, with the first token that differs.
    """

    hit: int = 0
    recomputed: int = 0
    miss: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Event:
    """One more token of one answer.

    Attributes:
        request: the number that `Engine.add` gave.
        choice: which of the n answers.
        token: its id, or None if the answer ended without one (cancelled, failed).
        logprob: log-probability under the model, before temperature, truncation and grammar.
        top: the likeliest tokens and their log-probabilities.
        finish: why the answer ends with this token, or None.
        settled: bytes of the answer that no stop string can still take back; None without stop strings.
        error: what failed.
        blocks: for a trace: for each CSA layer, the numbers of the blocks that were read, in rising order.
    """

    request: int
    choice: int
    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None
    settled: int | None = None
    error: str | None = None
    blocks: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True)
class Score:
    """How likely a token of a prompt was, and what was likelier in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Answer:
    """All that one choice gave, gathered from its events."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    settled: int | None = None
    error: str | None = None

    def add(self, event: Event) -> None:
        """Take an event in."""
        if event.token is not None:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
        self.finish_reason, self.settled, self.error = event.finish, event.settled, event.error
