"""Text completion over a completer: continue, fill in the middle, or score a prompt (api.md 1; evals.md 10)."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field

from abyssal.base.errors import AbyssalError
from abyssal.chat.api import Accepted, Completion, Continued, PromptUse, TokenInfo, Usage
from abyssal.encoding.literals import BOS, EOS
from abyssal.encoding.tokenizer import Piece
from abyssal.server import sse
from abyssal.server.errors import ApiError, api_error
from abyssal.server.fields import SampledBody, checked, stops_of
from abyssal.server.metrics import Meter
from abyssal.server.names import Named, resolve
from abyssal.server.openai import FINISH, StreamOptions, usage_of
from abyssal.server.service import Service

# the vendor's tokenizers have these since V3; ours has none
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
MAX_TOKENS = 16  # OpenAI's default
PROMPTS = 128


class CompletionBody(SampledBody):
    """The fields of a request that we know; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class Asked:
    """A checked request: one completion for each prompt."""

    body: CompletionBody
    completions: tuple[Completion, ...]
    named: Named

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.stream)


def _prompts(body: CompletionBody, service: Service) -> list[Sequence[Piece] | Sequence[int]]:
    """Prompts as pieces or ids. Text gets a BOS unless the client says that it brings its own."""
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not texts:
        raise ApiError(400, "prompt is empty: give text or token ids", param="prompt")
    if len(texts) > PROMPTS and not isinstance(texts[0], int):
        raise ApiError(422, f"prompt has {len(texts)} prompts: give at most {PROMPTS}", param="prompt")
    if isinstance(texts[0], int):
        texts = [texts]
    start = [] if body.add_special_tokens is False else [Piece(BOS, special=True)]
    prompts: list[Sequence[Piece] | Sequence[int]] = []
    for text in texts:
        if not isinstance(text, str):
            prompts.append(list(text))
        elif body.suffix is None:
            prompts.append([*start, Piece(text)])
        elif service.completer.special(FIM_HOLE) is None:
            raise ApiError(
                400, f"this model has no token {FIM_HOLE}, so it cannot fill in the middle: leave out suffix",
                param="suffix", code="unsupported_parameter",
            )  # fmt: skip
        else:
            prompts.append(
                [*start, Piece(FIM_BEGIN, special=True), Piece(text), Piece(FIM_HOLE, special=True),
                 Piece(body.suffix), Piece(FIM_END, special=True)]
            )  # fmt: skip
    return prompts


def asked(data: Any, service: Service) -> Asked:
    """Check and translate a request.

    Raises:
        ApiError: 400 for a malformed body, 404 for an unknown model, 422 for a value out of range.
    """
    body = checked(CompletionBody, data)
    named = resolve(body.model, service.completer.model, legacy=service.settings.legacy_names)
    stop = stops_of(body.stop, "stop")
    completions = tuple(
        Completion(
            prompt=prompt,
            max_tokens=max(MAX_TOKENS if body.max_tokens is None else body.max_tokens, 1),
            sampling=body.sampling(),
            top_logprobs=body.logprobs,
            n=body.n or 1,
            stop=stop,
            score_prompt=bool(body.echo) and body.logprobs is not None,
            trace=bool(body.echo),  # the prompt's ids, which an echo spells
        )
        for prompt in _prompts(body, service)
    )
    return Asked(body, completions, named)


# a token, and what is known of it; the first token of a prompt has no log-probability
_Token = tuple[int, TokenInfo | None]


@dataclass(frozen=True)
class _Part:
    """More of one answer."""

    index: int
    text: str
    tokens: tuple[_Token, ...] = ()
    finish: str | None = None


class Run:
    """The completions of one request, one after another.

    Attributes:
        id: names it in headers.
        notes, repaired: none; chat turns have some.
        completion: tokens of all answers so far.
    """

    notes: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()

    def __init__(self, asked: Asked, service: Service, caller: str):
        self.id = f"req_{secrets.token_hex(12)}"
        self.asked, self.service, self._caller = asked, service, caller
        self.completion = 0
        self._read: dict[int, PromptUse] = {}  # of each prompt what was said last: numbers may become exact late
        self._created = int(time.time())

    @property
    def prompt(self) -> int:
        """Tokens of all prompts so far."""
        return sum(use.tokens for use in self._read.values())

    @property
    def cached(self) -> int:
        """Those that were reused."""
        return sum(use.cached for use in self._read.values())

    async def parts(self) -> AsyncIterator[_Part | None]:
        """None once the first completion is accepted, then parts of answers.

        Raises:
            InputError, CapacityError: a prompt cannot be done.
            ApiError: there is no place, or generation failed.
        """
        service, meter = self.service, self.service.metrics.meter()
        accepted = False
        with service.limits.place(self._caller):
            try:
                for number, completion in enumerate(self.asked.completions):
                    async with aclosing(service.completer.complete(completion)) as stream:  # type: ignore[type-var]
                        async for part in stream:
                            if not isinstance(part, Accepted):
                                for shown in self._shown(part, number, meter):
                                    yield shown
                            elif not accepted:
                                accepted = True
                                yield None
            finally:
                meter.used(self.prompt, self.cached, self.completion)
                service.limits.used(self._caller, self.prompt + self.completion)

    def _shown(self, part: PromptUse | Continued, number: int, meter: Meter) -> list[_Part]:
        """What the client sees of a part of the prompt of this number."""
        body = self.asked.body
        first = number * (body.n or 1)  # index of its first answer
        if isinstance(part, PromptUse):
            echoed_before = number in self._read
            self._read[number] = part
            if not body.echo or echoed_before:
                return []
            scores = part.scores or (None,) * len(part.ids)
            echoed = self.service.completer.decode(part.ids)
            if body.skip_special_tokens is not False:
                echoed = echoed.removeprefix(BOS)
            tokens = tuple(zip(part.ids, scores, strict=True))
            return [_Part(first + i, echoed, tokens) for i in range(body.n or 1)]
        if part.finish == "failed":
            raise ApiError(500, part.error or "generation failed: try again")
        self.completion += part.tokens
        if part.tokens:
            meter.output()
        if part.finish is not None:
            meter.finished(part.finish)
        if body.max_tokens == 0:
            return [_Part(first + part.choice, "", (), "length")] if part.finish is not None else []
        text = part.text
        if part.finish == "stop" and body.skip_special_tokens is not False:
            text = text.removesuffix(EOS)
        shown = ((part.info.token, part.info),) if part.info is not None else ()
        return [_Part(first + part.choice, text, shown, FINISH.get(part.finish or "", part.finish))]

    def head(self) -> dict[str, Any]:
        """What all chunks share."""
        completer = self.service.completer
        return {"id": f"cmpl-{self.id[4:]}", "object": "text_completion", "created": self._created,
                "model": completer.model, "system_fingerprint": f"abyssal-{completer.snapshot}"}  # fmt: skip

    def usage(self) -> dict[str, Any]:
        """The usage object."""
        return usage_of(Usage(self.prompt, self.cached, self.completion, 0))

    def choice(self, part: _Part, offset: int) -> dict[str, Any]:
        """A part as a choice of the response; `offset` characters of its answer came before."""
        logprobs = None
        if self.asked.body.logprobs is not None:
            logprobs = self._logprobs(part, offset)
        return {"index": part.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def _logprobs(self, part: _Part, offset: int) -> dict[str, Any]:
        count = self.asked.body.logprobs or 0
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        at = 0  # in the part's text, where tokens like BOS are not shown
        for token, info in part.tokens:
            name = self._name(token)
            shown["tokens"].append(name)
            shown["token_logprobs"].append(info.logprob if info else None)
            shown["top_logprobs"].append({self._name(t): p for t, p in info.top[:count]} if info else None)
            shown["text_offset"].append(offset + at)
            spelled = self.service.completer.token_bytes(token).decode(errors="ignore")
            at += len(spelled) if part.text.startswith(spelled, at) else 0
        return shown

    def _name(self, token: int) -> str:
        """How a token is written: its text, or its bytes where those are no whole characters."""
        if self.asked.body.return_tokens_as_token_ids:
            return f"token_id:{token}"
        raw = self.service.completer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


async def whole(run: Run, asked: Asked) -> AsyncIterator[dict[str, Any] | None]:
    """None once the request is accepted, then the answer.

    Raises:
        as `Run.parts`.
    """
    texts: dict[int, list[str]] = defaultdict(list)
    tokens: dict[int, list[_Token]] = defaultdict(list)
    finish: dict[int, str | None] = {}
    async with aclosing(run.parts()) as parts:  # type: ignore[type-var]
        async for part in parts:
            if part is None:
                yield None
                continue
            texts[part.index].append(part.text)
            tokens[part.index] += part.tokens
            finish[part.index] = part.finish
    made = [_Part(i, "".join(texts[i]), tuple(tokens[i]), finish[i]) for i in sorted(texts)]
    yield {**run.head(), "choices": [run.choice(part, 0) for part in made], "usage": run.usage()}


async def stream(run: Run, asked: Asked) -> AsyncIterator[bytes]:
    """The answer as chunks; the first comes with the first token."""
    offsets: dict[int, int] = defaultdict(int)
    head = run.head()
    accepted = False
    try:
        async with aclosing(run.parts()) as parts:  # type: ignore[type-var]
            async for part in parts:
                if part is None:
                    accepted = True
                    yield sse.COMMENT  # the status goes out
                    continue
                yield sse.data({**head, "choices": [run.choice(part, offsets[part.index])]})
                offsets[part.index] += len(part.text)
    except AbyssalError as error:
        if not accepted:
            raise
        yield sse.data(api_error(error).openai())
        return
    if asked.body.stream_options is not None and asked.body.stream_options.include_usage:
        yield sse.data({**head, "choices": [], "usage": run.usage()})
    yield sse.DONE
