"""One turn of a conversation: render the prompt, let a completer continue it, parse what comes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from abyssal.base.errors import InputError
from abyssal.chat.api import (
    Accepted,
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
from abyssal.encoding.parse import Call, End, Event, Parser, Reasoning, Repair, Text
from abyssal.encoding.render import render
from abyssal.encoding.tokenizer import Piece

THINK_MAX_CONTEXT = 384 * 1024  # what the model card asks for


@dataclass
class _Answer:
    parser: Parser
    calls: int = 0
    tokens: int = 0
    reasoning_tokens: int = 0
    over: bool = False
    held: str = ""  # content that may begin a stop string


def prompt_of(completer: Completer, request: ChatRequest) -> list[Piece]:
    """The prompt of a request.

    Raises:
        InputError: the conversation is malformed, or asks for Think Max on too short a context.
    """
    if request.thinking and request.effort == "max" and completer.context < THINK_MAX_CONTEXT:
        raise InputError(
            f"effort max needs a context of {THINK_MAX_CONTEXT} tokens, this model has {completer.context}:"
            " ask for high"
        )
    return render(
        request.messages, thinking=request.thinking, snapshot=completer.snapshot, effort=request.effort
    )


async def answer(completer: Completer, request: ChatRequest) -> AsyncIterator[ChatEvent]:
    """The events of a turn; the first is `Accepted`, the last `Usage`.

    Raises:
        InputError: the request cannot be done; nothing has been said yet.
    """
    prompt = prompt_of(completer, request)
    continues = request.messages[-1].role == "assistant"  # a prefix: its thinking is over
    thinking = request.thinking and not continues
    tools = request.tools
    answers = [
        _Answer(Parser(thinking=thinking, tools=tools, allow_calls=request.use_tools)) for _ in range(request.n)
    ]
    completion = Completion(
        prompt=prompt,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        top_logprobs=request.top_logprobs or 0,
        n=request.n,
    )
    use = PromptUse(0, 0)
    async with aclosing(completer.complete(completion)) as stream:  # type: ignore[type-var]
        async for part in stream:
            if isinstance(part, Accepted):
                yield part
                continue
            if isinstance(part, PromptUse):
                use = part
                continue
            state = answers[part.choice]
            if state.over:
                continue
            for event in _events(state, part, request):
                yield event
            if all(other.over for other in answers):
                break
    yield Usage(
        use.tokens,
        use.cached,
        sum(state.tokens for state in answers),
        sum(state.reasoning_tokens for state in answers),
        use.reason,
    )


def _events(state: _Answer, part: Continued, request: ChatRequest) -> list[ChatEvent]:
    events: list[ChatEvent] = []
    if part.info is not None:
        state.tokens += 1
        state.reasoning_tokens += state.parser.thinking
        if request.top_logprobs is not None:
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
    text = state.held + event.text
    state.held = ""
    found = [(at, word) for word in stop if (at := text.find(word)) >= 0]
    if found:
        text = text[: min(found)[0]]
        state.over = True
    else:
        held = max(
            (n for word in stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n])),
            default=0,
        )
        text, state.held = text[: len(text) - held], text[len(text) - held :]
    events: list[ChatEvent] = [TextDelta(choice, text)] if text else []
    if state.over:
        events.append(Finished(choice, "stop"))
    return events


def _released(state: _Answer, choice: int) -> list[ChatEvent]:
    """Content that was held back for a stop string that did not come."""
    held, state.held = state.held, ""
    return [TextDelta(choice, held)] if held else []
