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

FinishReason = Literal["stop", "length", "tool_calls", "failed"]


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
        max_tokens: most tokens of an answer, thinking included; None for what the context leaves.
        use_tools: False for tool_choice "none".
        stop: texts that end the content.
        top_logprobs: None for no log-probabilities, else how many beside the chosen token.
        n: answers.
    """

    messages: tuple[Message, ...]
    thinking: bool = True
    effort: Effort | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    use_tools: bool = True
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    n: int = 1

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """All function objects that the messages define."""
        return tuple(tool for message in self.messages for tool in message.tools)


@dataclass(frozen=True)
class TokenInfo:
    """A token, its log-probability, and the likeliest ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
    """Tokens of an answer with their log-probabilities, when they were asked for."""

    choice: int
    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class Finished:
    """An answer is over; `error` says what failed."""

    choice: int
    reason: FinishReason
    error: str | None = None


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


ChatEvent = Accepted | ReasoningDelta | TextDelta | CallMade | Repaired | TokensRead | Finished | Usage


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Prompt pieces to continue, and how."""

    prompt: Sequence[Piece]
    max_tokens: int | None
    sampling: Sampling
    top_logprobs: int = 0
    n: int = 1


@dataclass(frozen=True)
class Continued:
    """One more stretch of one answer.

    Attributes:
        choice: which answer.
        text: what it spells, special tokens spelled out; may be empty until a character is whole.
        info: the token, where known.
        finish: why it is over, or None.
    """

    choice: int
    text: str
    info: TokenInfo | None = None
    finish: Literal["stop", "length", "failed"] | None = None
    error: str | None = None


@dataclass(frozen=True)
class PromptUse:
    """Tokens of a prompt, how many were reused, and why not more; comes before the first token."""

    tokens: int
    cached: int
    reason: str = ""


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

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""

    def count(self, prompt: Sequence[Piece]) -> int:
        """Tokens of a prompt."""

    def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Continue, beginning with `Accepted`; closing the iterator ends the work within one step.

        Raises:
            InputError: the request cannot be done; nothing has been said yet.
            CapacityError: there is no memory for it at all.
        """
