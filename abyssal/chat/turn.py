"""One turn of a conversation: render the prompt, let a completer continue it, parse what comes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from abyssal.base.errors import InputError
from abyssal.chat.api import (
    CallMade,
    ChatEvent,
    ChatRequest,
    Completer,
    Completion,
    Continued,
    Finished,
    FinishReason,
    PromptUse,
    ReasoningDelta,
    Repaired,
    TextDelta,
    TokensRead,
    Usage,
)
from abyssal.chat.constrain.calls import constraint_of
from abyssal.encoding.literals import DSML
from abyssal.encoding.parse import Call, End, Event, Parser, Reasoning, Repair, Text
from abyssal.encoding.render import render
from abyssal.encoding.tokenizer import Piece

THINK_MAX_CONTEXT = 384 * 1024  # what the model card asks for
TRACED = 5  # likeliest tokens that a trace shows


@dataclass
class _Answer:
    parser: Parser
    calls: int = 0
    tokens: int = 0
    reasoning_tokens: int = 0
    over: bool = False
    held: str = ""  # content that may begin a stop string


def settled(request: ChatRequest, completer: Completer) -> tuple[ChatRequest, tuple[str, ...]]:
    """The request as it can be done, and notes of what differs from what was asked.

    Raises:
        InputError: nobody asks anything, or it asks for Think Max on too short a context and allows no fallback.
    """
    last = request.messages[-1]
    if last.role == "assistant" and not last.prefix:
        raise InputError("the last message is the assistant's: set prefix: true to continue it, or ask something")
    if not (request.thinking and request.effort == "max" and completer.context < THINK_MAX_CONTEXT):
        return request, ()
    if request.allow_effort_fallback:
        return replace(request, effort="high"), ("effort max needs a longer context: high was used",)
    raise InputError(
        f"effort max needs a context of {THINK_MAX_CONTEXT} tokens, this model has {completer.context}:"
        " ask for high, or allow_effort_fallback"
    )


def prompt_of(completer: Completer, request: ChatRequest) -> list[Piece]:
    """The prompt of a request.

    Raises:
        InputError: the conversation is malformed.
    """
    return render(
        request.messages, thinking=request.thinking, snapshot=completer.snapshot, effort=request.effort
    )


def completion_of(completer: Completer, request: ChatRequest, thinking: bool) -> Completion:
    """What to ask the completer: the prompt and everything that binds the answer.

    Args:
        thinking: whether the answer begins with reasoning.
    Raises:
        InputError: tools or a schema cannot be enforced, or the conversation is malformed.
    """
    constraint = constraint_of(
        tools=request.tools,
        mode=request.tool_mode,
        name=request.tool_name,
        parallel=request.parallel_calls,
        schema=request.schema,
        schema_strict=request.schema_strict,
        thinking=thinking,
    )
    if request.messages[-1].role == "assistant" and constraint is not None and not constraint.after:
        raise InputError("a prefix cannot be continued to a forced call or JSON: leave out one of them")
    return Completion(
        prompt=prompt_of(completer, request),
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        top_logprobs=max(request.top_logprobs or 0, TRACED) if request.trace else request.top_logprobs,
        optional_logprobs=request.top_logprobs is None,
        n=request.n,
        banned=(DSML,) if request.tools and request.tool_mode == "none" else (),
        constraint=constraint,
        max_reasoning=request.max_reasoning if thinking else None,
        trace=request.trace,
    )


async def answer(completer: Completer, request: ChatRequest, *, bound: bool = True) -> AsyncIterator[ChatEvent]:
    """The events of a turn; the first is `Accepted`, the last `Usage`.

    Args:
        completer: what continues the prompt.
        request: the conversation.
        bound: hold the answer to the grammar of its calls or schema; without, what a model does by itself is seen.
    Raises:
        InputError: the request cannot be done; nothing has been said yet.
    """
    thinking = request.answer_thinks
    completion = completion_of(completer, request, thinking)
    if not bound:
        completion = replace(completion, constraint=None)
    tools, allowed = request.tools, request.tool_mode != "none"
    answers = [_Answer(Parser(thinking=thinking, tools=tools, allow_calls=allowed)) for _ in range(request.n)]
    use = PromptUse(0, 0)
    async with aclosing(completer.complete(completion)) as stream:  # type: ignore[type-var]
        async for part in stream:
            if isinstance(part, Continued):
                state = answers[part.choice]
                if state.over:
                    continue
                for event in _events(state, part, request):
                    yield event
                if state.over and all(other.over for other in answers):
                    break
                continue
            if isinstance(part, PromptUse):
                use = part
            yield part
    yield Usage(
        use.tokens,
        use.cached,
        sum(state.tokens for state in answers),
        sum(state.reasoning_tokens for state in answers),
        use.reason,
    )


def _events(state: _Answer, part: Continued, request: ChatRequest) -> list[ChatEvent]:
    events: list[ChatEvent] = []
    state.tokens += part.tokens
    state.reasoning_tokens += part.tokens if state.parser.thinking else 0
    if part.info is not None:
        events.append(TokensRead(part.choice, (part.info,)))
    parsed = state.parser.feed(part.text)
    if part.finish is not None:
        parsed += state.parser.finish()
    for event in parsed:
        events += _translated(state, event, part.choice, request)
        if state.over:
            return events
    if part.finish is not None:
        reason: FinishReason = part.finish
        if reason == "stop" and state.calls:
            reason = "tool_calls"
        events += _released(state, part.choice)
        events.append(Finished(part.choice, reason, part.error))
        state.over = True
    return events


def _translated(state: _Answer, event: Event, choice: int, request: ChatRequest) -> list[ChatEvent]:
    if isinstance(event, Reasoning):
        return [ReasoningDelta(choice, event.text)]
    if isinstance(event, Repair):
        return [Repaired(choice, event.name, event.detail)]
    if isinstance(event, End):
        return []
    if isinstance(event, Call):
        index, state.calls = state.calls, state.calls + 1
        # unique over turns and answers, so that results find their calls
        made = CallMade(choice, index, f"call_{secrets.token_hex(12)}", event.name, event.arguments)
        return [*_released(state, choice), made]
    return _content(state, event, choice, request.stop)


def _content(state: _Answer, event: Text, choice: int, stop: tuple[str, ...]) -> list[ChatEvent]:
    """Content up to a stop string, which may lie across pieces."""
    if not stop:
        return [TextDelta(choice, event.text)] if event.text else []
    text = state.held + event.text
    state.held = ""
    ended_by = None
    found = [(at, word) for word in stop if (at := text.find(word)) >= 0]
    if found:
        at, ended_by = min(found)
        text = text[:at]
        state.over = True
    else:
        held = max(
            (n for word in stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n])),
            default=0,
        )
        text, state.held = text[: len(text) - held], text[len(text) - held :]
    events: list[ChatEvent] = [TextDelta(choice, text)] if text else []
    if state.over:
        events.append(Finished(choice, "stop", stop=ended_by))
    return events


def _released(state: _Answer, choice: int) -> list[ChatEvent]:
    """Content that was held back for a stop string that did not come."""
    held, state.held = state.held, ""
    return [TextDelta(choice, held)] if held else []
