"""What all wires share: limits, repairs, metrics and traces around the events of a turn."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from abyssal.chat.api import (
    CallMade,
    ChatEvent,
    ChatRequest,
    Completer,
    Finished,
    PromptUse,
    ReasoningDelta,
    Repaired,
    TextDelta,
    TokensRead,
    Usage,
)
from abyssal.chat.turn import answer, settled
from abyssal.server.limits import Limits
from abyssal.server.metrics import Meter, Metrics
from abyssal.server.reasoning import ReasoningMemory
from abyssal.server.settings import Settings
from abyssal.server.trace import Trace, Traces

log = logging.getLogger("abyssal.server")


class Service:
    """A completer and what surrounds it in a server.

    Attributes:
        signing: key of the signatures of thinking blocks; lives as long as the server.
    """

    def __init__(self, completer: Completer, settings: Settings):
        self.completer = completer
        self.settings = settings
        self.limits = Limits(settings)
        self.metrics = Metrics(completer)
        self.memory = ReasoningMemory()
        self.traces = Traces(settings.traces)
        self.signing = secrets.token_bytes(32)

    def turn(self, request: ChatRequest, caller: str, route: str) -> Turn:
        """A turn that has been checked and mended, but has not begun.

        Raises:
            ApiError, InputError: the request cannot be done.
        """
        return Turn(self, request, caller, route)


class Turn:
    """One request on its way through the server.

    Attributes:
        id: names it in headers, logs and traces.
        request: what is asked, after repairs.
        notes: what was done differently from what was asked.
        repaired: what was mended in the conversation before it began, and then in the answer.
    """

    def __init__(self, service: Service, request: ChatRequest, caller: str, route: str):
        self.id = f"req_{secrets.token_hex(12)}"
        self.service = service
        self.completer = service.completer
        self.meter = service.metrics.meter()
        self._caller, self._route = caller, route
        s = service.settings
        request, self.notes = settled(request, self.completer)
        repaired: tuple[str, ...] = ()
        if request.thinking and request.tools:
            messages, repaired = service.memory.restored(request.messages, caller, strict=s.strict)
            request = replace(request, messages=messages)
        if s.vendor_sampling and request.thinking:
            sampling = replace(request.sampling, temperature=1.0, presence_penalty=0.0, frequency_penalty=0.0)
            request = replace(request, sampling=sampling)
        if s.answer_reserve and request.thinking and request.max_tokens is not None:
            most = max(request.max_tokens - s.answer_reserve, 1)
            request = replace(request, max_reasoning=min(request.max_reasoning or most, most))
        self.request = replace(request, trace=service.traces.wanted)
        self.repaired = list(repaired)
        for name in repaired:
            self.meter.repaired(name)

    async def events(self) -> AsyncIterator[ChatEvent]:
        """The events of `chat.turn.answer`; `TokensRead` only where log-probabilities are asked for.

        Raises:
            ApiError: there is no place now; nothing has been said yet.
            as `answer`.
        """
        service, meter = self.service, self.meter
        trace = Trace(self.id, self._caller, self._route, self.request) if self.request.trace else None
        told = _Told()
        tokens_too = self.request.top_logprobs is not None
        with service.limits.place(self._caller):
            try:
                async with aclosing(answer(self.completer, self.request)) as events:  # type: ignore[type-var]
                    async for event in events:
                        told.add(event, meter)
                        if trace is not None:
                            trace.add(event, meter.seconds)
                        if isinstance(event, TokensRead):
                            if tokens_too:
                                yield event
                            continue
                        if isinstance(event, Repaired):
                            self.repaired.append(event.name)
                        yield event
            finally:
                self._over(told, meter, trace)

    def _over(self, told: _Told, meter: Meter, trace: Trace | None) -> None:
        service = self.service
        # who leaves before the end has used what was made until then
        usage = replace(told.usage, completion=max(told.usage.completion, told.read))
        meter.used(usage.prompt, usage.cached, usage.completion, usage.reasoning)
        service.limits.used(self._caller, usage.prompt + usage.completion)
        for choice, calls in told.calls.items():
            if self.request.thinking:
                service.memory.remember(self._caller, calls, "".join(told.reasoning.get(choice, ())))
        if trace is not None:
            service.traces.keep(trace)
        shown: dict[str, Any] = {
            "request": self.id,
            "route": self._route,
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "finish_reason": told.finish or "aborted",
            "seconds": round(meter.seconds, 3),
        }
        if service.settings.log_prompts:
            shown["messages"] = [f"{m.role}: {m.content}" for m in self.request.messages]
            shown["answer"] = "".join(told.content)
        log.info("answered", extra=shown)


class _Told:
    """What the events of a turn have said so far."""

    def __init__(self) -> None:
        self.usage = Usage(0, 0, 0, 0)
        self.reasoning: dict[int, list[str]] = {}
        self.calls: dict[int, list[str]] = {}
        self.content: list[str] = []
        self.read = 0
        self.finish: str | None = None

    def add(self, event: ChatEvent, meter: Meter) -> None:
        """One more."""
        if isinstance(event, TokensRead):
            self.read += len(event.tokens)
        elif isinstance(event, TextDelta):
            self.content.append(event.text)
            meter.output()
        elif isinstance(event, ReasoningDelta):
            self.reasoning.setdefault(event.choice, []).append(event.text)
            meter.output()
        elif isinstance(event, CallMade):
            self.calls.setdefault(event.choice, []).append(event.id)
            meter.output()
        elif isinstance(event, Repaired):
            meter.repaired(event.name)
        elif isinstance(event, Finished):
            self.finish = event.reason
            meter.finished(event.reason)
        elif isinstance(event, PromptUse):
            self.usage = Usage(event.tokens, event.cached, 0, 0)
        elif isinstance(event, Usage):
            self.usage = event
