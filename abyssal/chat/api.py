"""What a caller asks of a chat, and the events that answer it. No torch.

The server's wires, the agent, the benchmarks and the rollouts all speak this; what generates the tokens stands
behind `Completer`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from abyssal.encoding.messages import Message
from abyssal.encoding.snapshots import Effort, Snapshot
from abyssal.encoding.tokenizer import Piece

FinishReason = Literal["stop", "length", "tool_calls", "interrupted", "failed"]
ToolMode = Literal["auto", "none", "required"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; see `abyssal.engine.sampler.Sampling` for the meaning of each."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A conversation to continue.

    Attributes:
        messages: the conversation; tools stand in its messages.
        thinking: thinking mode, or Non-think.
        effort: how much to think.
        allow_effort_fallback: high instead of max where the context is too short for Think Max.
        max_reasoning: most tokens of thinking, after which it is closed; None for no limit.
        max_tokens: most tokens of an answer, thinking included; None for what the context leaves.
        tool_mode: whether tools may, must not or must be called.
        tool_name: the one tool that "required" means, or None for any.
        parallel_calls: whether an answer may make several calls.
        schema: JSON schema that the content must match, or None.
        schema_strict: refuse a schema that cannot be enforced whole, instead of enforcing what can be.
        stop: texts that end the content.
        top_logprobs: None for no log-probabilities, else how many beside the chosen token.
        n: answers.
        trace: say for each token what a trace page shows; see `TokenInfo.blocks` and `PromptUse.ids`.
    """

    messages: tuple[Message, ...]
    thinking: bool = True
    effort: Effort | None = None
    allow_effort_fallback: bool = False
    max_reasoning: int | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    tool_mode: ToolMode = "auto"
    tool_name: str | None = None
    parallel_calls: bool = True
    schema: Mapping[str, Any] | None = None
    schema_strict: bool = False
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    n: int = 1
    trace: bool = False

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """All function objects that the messages define."""
        return tuple(tool for message in self.messages for tool in message.tools)

    @property
    def answer_thinks(self) -> bool:
        """Whether the answer begins with thinking; what continues a prefix does not."""
        return self.thinking and self.messages[-1].role != "assistant"


@dataclass(frozen=True)
class TokenInfo:
    """A token, its log-probability, and the likeliest ones in its place.

    Attributes:
        blocks: for a trace: of each CSA layer, the compressed blocks that the indexer chose for this token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    blocks: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True)
class Accepted:
    """The request will be answered: what is refused is refused before this, the first event."""


@dataclass(frozen=True)
class ReasoningDelta:
    """More thinking."""

    choice: int
    text: str


@dataclass(frozen=True)
class TextDelta:
    """More content."""

    choice: int
    text: str


@dataclass(frozen=True)
class CallMade:
    """A whole tool call; `index` counts from 0 in its answer."""

    choice: int
    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Repaired:
    """Something in the model's output was mended; see `encoding.parse.Repair`."""

    choice: int
    name: str
    detail: str


@dataclass(frozen=True)
class TokensRead:
    """Tokens of an answer, where the completer names them."""

    choice: int
    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class Finished:
    """An answer is over; `error` says what failed, `stop` which stop text ended it."""

    choice: int
    reason: FinishReason
    error: str | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Usage:
    """What the request took, in tokens; the last event.

    Attributes:
        prompt: of the prompt, of which `cached` were reused.
        completion: of all answers, of which `reasoning` were thinking.
        cache_reason: why not more was reused.
    """

    prompt: int
    cached: int
    completion: int
    reasoning: int
    cache_reason: str = ""


@dataclass(frozen=True)
class PromptUse:
    """The prompt is read; comes before the first token.

    Attributes:
        tokens: of the prompt, of which `cached` were reused.
        reason: why not more was reused.
        ids: the tokens, for a trace.
        scores: of a prompt whose log-probabilities were asked for, its tokens; the first has none.
    """

    tokens: int
    cached: int
    reason: str = ""
    ids: tuple[int, ...] = ()
    scores: tuple[TokenInfo | None, ...] = ()


ChatEvent = Accepted | PromptUse | ReasoningDelta | TextDelta | CallMade | Repaired | TokensRead | Finished | Usage


@dataclass(frozen=True)
class Constraint:
    """What an answer must match from some place on.

    Attributes:
        grammar: in llguidance's dialect of Lark; a special piece stands for that one token.
        after: special tokens that must have come, in this order, before the grammar holds; none: from the start.
        lead: how every answer begins that matches; for engines that cannot be bound to a grammar.
        schema: the JSON schema that all of the answer matches, where it is one; for the same engines.
    """

    grammar: tuple[Piece, ...]
    after: tuple[str, ...] = ()
    lead: str = ""
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt to continue, and how.

    Attributes:
        prompt: pieces, or token ids.
        max_tokens: most tokens of an answer; None for what the context leaves.
        top_logprobs: how many to report beside each token; None for no log-probabilities.
        optional_logprobs: they are for a trace alone; who pays for them may leave them out.
        banned: special tokens that must not come.
        constraint: what the answer must match, or None.
        max_reasoning: tokens after which an unclosed thinking is closed, or None.
        stop: texts that end the answer and are no part of it.
        score_prompt: report the log-probabilities of the prompt's own tokens.
        trace: report prompt ids and chosen blocks.
    """

    prompt: Sequence[Piece] | Sequence[int]
    max_tokens: int | None
    sampling: Sampling
    top_logprobs: int | None = None
    optional_logprobs: bool = False
    n: int = 1
    banned: tuple[str, ...] = ()
    constraint: Constraint | None = None
    max_reasoning: int | None = None
    stop: tuple[str, ...] = ()
    score_prompt: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Continued:
    """One more stretch of one answer.

    Attributes:
        choice: which answer.
        text: what it spells, special tokens spelled out; may be empty until a character is whole.
        info: the token, where known.
        finish: why it is over, or None.
        count: how many tokens it is; None for one if it is named, else none.
    """

    choice: int
    text: str
    info: TokenInfo | None = None
    finish: Literal["stop", "length", "interrupted", "failed"] | None = None
    error: str | None = None
    count: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it is."""
        return int(self.info is not None) if self.count is None else self.count


@dataclass(frozen=True)
class Load:
    """What a completer is busy with.

    Attributes:
        running: answers that are being made.
        waiting: answers that wait for memory.
        cache_used: share of the cache's memory that is taken, 0 to 1.
        expert_hits, expert_misses, expert_bytes: experts that were in memory or read from disk, and the bytes of
            the latter so far; None where all are in memory.
    """

    running: int = 0
    waiting: int = 0
    cache_used: float = 0.0
    expert_hits: int | None = None
    expert_misses: int | None = None
    expert_bytes: int | None = None


class Completer(Protocol):
    """Continues a prompt: our engine, a scripted one, or another engine over HTTP."""

    @property
    def model(self) -> str:
        """Name of the model."""

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    def snapshot(self) -> Snapshot:
        """Whose encoding the model knows."""

    def encode(self, prompt: Sequence[Piece]) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: this completer has no tokenizer, or a special token is unknown to it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out.

        Raises:
            InputError: an id has no text, or this completer has no tokenizer.
        """

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""

    def special(self, text: str) -> int | None:
        """The id of a special token, or None if the model has none of this text."""

    def count(self, prompt: Sequence[Piece]) -> int:
        """Tokens of a prompt."""

    def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Continue, beginning with `Accepted`; closing the iterator ends the work within one step.

        Raises:
            InputError: the request cannot be done; nothing has been said yet.
            ContextError: of these, a prompt that is too long.
            CapacityError: there is no room for it now.
        """

    def load(self) -> Load:
        """What it is busy with, for operators."""

    def interrupt(self) -> None:
        """End everything that runs with the finish reason "interrupted"."""
