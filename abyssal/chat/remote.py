"""Another engine as a completer: vLLM, SGLang, llama.cpp's server, or our own, behind OpenAI's `/v1/completions`.

The engine continues prompts; rendering, parsing and repairs stay here. What engines have in common is OpenAI's text
completion. Beyond it we use, by name and where an engine has it:

- `continuous_usage_stats` (vLLM, SGLang): how many tokens a chunk is;
- `return_tokens_as_token_ids` (vLLM), `return_token_ids` (vLLM, SGLang): which tokens they are; llama.cpp always says;
- `structured_outputs` (vLLM), `json_schema` (llama.cpp), `response_format` (SGLang, and OpenAI's own name for it);
- `stop_reason` (vLLM) and `matched_stop` (SGLang), `/tokenize` (all three).

All three ignore the fields of a request that they do not know.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import httpx2

from abyssal.base.errors import AbyssalError, ContextError, InputError, RunError, TokenError
from abyssal.chat.api import Accepted, Completion, Constraint, Continued, Load, PromptUse, TokenInfo
from abyssal.chat.upstream import Choice, Chunk, context_of, entry_of, refusal, tokenize_body, tokenized
from abyssal.encoding.literals import DSML, EOS, SPECIAL_TOKENS, THINK_END
from abyssal.encoding.snapshots import Snapshot
from abyssal.encoding.tokenizer import Piece, Tokenizer

CONNECT_S = 10.0
ASK_S = 10.0  # for answers that take no generating
EVENT_BYTES = 64 << 20  # the first event of vLLM may repeat a prompt of a million ids
BANNED = -100.0  # OpenAI's bias for a token that must not come
SPARE = 64  # tokens of the context that SGLang may keep for drafts and count as part of the prompt
DONE = "[DONE]"
UNREPORTED = (
    "the upstream does not say what it reused (vLLM: --enable-prompt-tokens-details, SGLang: --enable-cache-report)"
)
NO_TOKENIZER = "this gateway has no tokenizer: start it with --tokenizer FOLDER"
# how an engine says that an answer is over; the last is how we say "interrupted"
FINISH: dict[str, Literal["stop", "length", "interrupted"]] = {
    "stop": "stop", "length": "length", "abort": "interrupted", "insufficient_system_resource": "interrupted",
}  # fmt: skip
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
log = logging.getLogger("abyssal.chat")

Wired = list[int] | str  # a prompt as it goes upstream: token ids, or text with special tokens spelled out


class RemoteCompleter:
    """A model that another engine serves. Use one in one event loop.

    Without a tokenizer, prompts are text in which a caller could forge special tokens, so those are broken up.

    Args:
        url: where it is, with or without `/v1`.
        model: its name there.
        context: tokens that prompt and answer may have together.
        engine: who serves it, as `/v1/models` names its owner; decides spellings.
        key: bearer token.
        tokenizer: the model's, or None.
        snapshot: whose encoding it knows.
    """

    def __init__(
        self,
        url: str,
        model: str,
        context: int,
        *,
        engine: str = "",
        key: str | None = None,
        tokenizer: Tokenizer | None = None,
        snapshot: Snapshot = "april",
    ):
        self.url, self.model, self.context, self.engine = _root(url), model, context, engine
        self.tokenizer = tokenizer
        self.snapshot: Snapshot = snapshot
        self._asking = _options(key, httpx2.Timeout(ASK_S))
        # a connection per request: nothing stays open between event loops, and none is reused that the engine is
        # about to close; as many as the server lets in
        self.client = httpx2.AsyncClient(
            **_options(key, httpx2.Timeout(None, connect=CONNECT_S)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self._runs: set[_Run] = set()
        self._warned: set[str] = set()

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        model: str | None = None,
        context: int | None = None,
        key: str | None = None,
        tokenizer: Tokenizer | None = None,
        snapshot: Snapshot = "april",
    ) -> RemoteCompleter:
        """Ask an engine what it serves.

        Args:
            model: its name there; None for the first.
            context: None for what the engine says.
            key, tokenizer, snapshot: as for the class.

        Raises:
            InputError: nobody answers, or the answer lacks what is not given here.
        """
        with httpx2.Client(**_options(key, httpx2.Timeout(ASK_S))) as client:
            entry = entry_of(client, _root(url), model)
            name, engine = model or entry.get("id"), entry.get("owned_by")
            if not isinstance(name, str):
                raise InputError(f"{url} names no model: give --upstream-model")
            found = context or context_of(client, _root(url), entry)
        if found is None:
            raise InputError(f"{url} does not say how long the context of {name} is: give --context")
        engine = engine if isinstance(engine, str) else ""
        return cls(url, name, found, engine=engine, key=key, tokenizer=tokenizer, snapshot=snapshot)

    def encode(self, prompt: Sequence[Piece]) -> list[int]:
        """Token ids of a prompt."""
        return self._known().encode_pieces(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return self._known().decode(ids, keep_special=True)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._known().token_bytes(token)

    def _known(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(NO_TOKENIZER)
        return self.tokenizer

    def special(self, text: str) -> int | None:
        """The id of a special token, or None."""
        try:
            return self._known().special(text)
        except InputError:
            return None

    def count(self, prompt: Sequence[Piece]) -> int:
        """Tokens of a prompt; waits for the upstream if there is no tokenizer here.

        Raises:
            InputError: neither has one.
        """
        if self.tokenizer is not None:
            return len(self.encode(prompt))
        with httpx2.Client(**self._asking) as client:
            try:
                response = client.post(f"{self.url}/tokenize", json=tokenize_body(self.model, self._spelled(prompt)))
            except httpx2.HTTPError as error:
                raise RunError(f"{self.url} does not answer ({error}): see whether it runs") from None
        ids = tokenized(response)
        if ids is None:
            raise InputError(f"{self.url} has no /tokenize, and {NO_TOKENIZER}")
        return len(ids)

    def load(self) -> Load:
        """Answers that are being made; what waits, the upstream knows."""
        return Load(running=sum(run.completion.n for run in tuple(self._runs)))

    def interrupt(self) -> None:
        """End everything that runs; from any thread."""
        for run in tuple(self._runs):
            run.interrupt()

    def close(self) -> None:
        """Nothing stays open between requests; a model in this process has more to end."""

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Continue a prompt; see `Completer`.

        Raises:
            InputError: the request cannot be done, or the upstream refuses it.
            CapacityError: the upstream is busy.
            RunError: it does not answer, or breaks.
        """
        run = _Run(self, completion)
        unfinished = set(range(completion.n))
        accepted = False
        self._runs.add(run)
        tasks = run.start()
        try:
            while unfinished:
                said = await run.said.get()
                if isinstance(said, _Broken):
                    if not accepted or not isinstance(said.error, AbyssalError):
                        raise said.error
                    for choice in unfinished & said.choices:
                        yield Continued(choice, "", None, "failed", str(said.error))
                    unfinished -= said.choices
                elif said is None:
                    if not accepted:
                        yield Accepted()
                    for choice in unfinished:
                        yield Continued(choice, "", None, "interrupted")
                    return
                else:
                    accepted |= isinstance(said, Accepted)
                    if isinstance(said, Continued) and said.finish is not None:
                        unfinished.discard(said.choice)
                    yield said
        finally:
            self._runs.discard(run)
            for task in tasks:
                task.cancel()  # closes its connection, at which the engine stops
            await asyncio.gather(*tasks, return_exceptions=True)

    # prompts

    async def wired(self, prompt: Sequence[Piece] | Sequence[int], tail: Sequence[Piece] = ()) -> Wired:
        """A prompt, and pieces behind it, as they go upstream: as token ids wherever somebody can make them.

        Raises:
            InputError: it cannot be encoded.
        """
        ids = [token for token in prompt if isinstance(token, int)]
        pieces = [piece for piece in prompt if isinstance(piece, Piece)] + list(tail)
        if self.tokenizer is not None:
            return ids + await asyncio.to_thread(self.encode, pieces)
        if ids:
            if pieces:
                raise InputError(NO_TOKENIZER)
            return ids
        text = self._spelled(pieces)
        # text gets another BOS from SGLang and llama.cpp, and nobody here knows its length; ids do not
        try:
            body = tokenize_body(self.model, text)
            response = await self.client.post(f"{self.url}/tokenize", json=body, timeout=ASK_S)
        except httpx2.HTTPError as error:
            raise RunError(f"{self.url} does not answer ({error}): see whether it runs") from None
        found = tokenized(response)
        if found is None:
            self._warn("prompts go as text, since the upstream has no /tokenize: give --tokenizer FOLDER")
        return text if found is None else found

    def _spelled(self, pieces: Sequence[Piece]) -> str:
        """A prompt as text, in which only special pieces spell special tokens."""
        texts = []
        for piece in pieces:
            text = piece.text
            if not piece.special and _SPECIAL.search(text):
                text = _SPECIAL.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)
                self._warn("a prompt spells special tokens; they are broken up: give --tokenizer FOLDER to keep them")
            texts.append(text)
        spelled = "".join(texts)
        try:
            spelled.encode()
        except UnicodeEncodeError as error:
            raise TokenError(f"the text is not valid Unicode ({error}): remove lone surrogates") from None
        return spelled

    def room(self, prompt: Wired, asked: int | None) -> int:
        """Most tokens of an answer; engines refuse more than fit, and OpenAI's default is 16.

        Raises:
            InputError: there is no room for any.
        """
        if isinstance(prompt, str):
            # V4's tokens hold more than two bytes on average; where that is wrong, the engine names both numbers
            return asked or max(self.context - len(prompt.encode()) // 2, 1)
        if len(prompt) >= self.context:
            raise ContextError(f"the prompt has {len(prompt)} tokens, the context holds {self.context}: shorten it")
        left = self.context - len(prompt)
        if self.engine == "sglang":
            left = max(left - SPARE, 1)
        return min(asked or left, left)

    def _warn(self, text: str) -> None:
        """Say something once."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)


@dataclass
class _Answer:
    """What a request has said of one answer."""

    choice: int
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    finish: Literal["stop", "length", "interrupted", "failed"] | None = None
    error: str | None = None
    closed: bool = False  # its thinking
    echoed: bool = False  # the prompt has come back


@dataclass(frozen=True)
class _Broken:
    """Answers that will not go on."""

    choices: set[int]
    error: Exception


class _Run:
    """One completion: the requests that it takes, and what they say.

    Engines cannot be bound to our grammar. What of it can be had otherwise is had so: the way that every matching
    answer begins is put behind the prompt, and a JSON schema goes to the engine's own grammar. Both hold only behind
    the thinking, so an answer that thinks first is two requests.

    Attributes:
        said: what happened, in order; None for an interruption.
    """

    def __init__(self, remote: RemoteCompleter, completion: Completion):
        self.remote, self.completion = remote, completion
        self.said: asyncio.Queue[Accepted | PromptUse | Continued | _Broken | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._accepted = False
        self._use: PromptUse | None = None
        self._names = completion.top_logprobs is not None and not completion.optional_logprobs
        if (self._names or completion.score_prompt) and remote.tokenizer is None:
            raise InputError(f"log-probabilities need token ids, and {NO_TOKENIZER}")
        bound = completion.constraint
        # of calls that are free to come nothing can be had so: the parser judges them
        self._bound: Constraint | None = bound if bound is not None and (bound.lead or bound.schema) else None

    def interrupt(self) -> None:
        """End it, from any thread."""
        self._loop.call_soon_threadsafe(self.said.put_nowait, None)

    def start(self) -> list[asyncio.Task[None]]:
        """Begin what there is to do, side by side."""
        c = self.completion
        if c.max_reasoning is None and (self._bound is None or not self._bound.after):
            return [asyncio.create_task(self._guarded(set(range(c.n))))]
        return [asyncio.create_task(self._guarded({choice}, choice)) for choice in range(c.n)]

    async def _guarded(self, choices: set[int], choice: int | None = None) -> None:
        try:
            await (self._at_once() if choice is None else self._in_two(choice))
        except Exception as error:
            self.said.put_nowait(_Broken(choices, error))

    async def _at_once(self) -> None:
        """All answers in one request."""
        c, remote = self.completion, self.remote
        lead = self._bound.lead if self._bound is not None else ""
        prompt = await remote.wired(c.prompt, _pieces(lead))
        answers = [_Answer(choice) for choice in range(c.n)]
        body = self._body(prompt, remote.room(prompt, c.max_tokens), c.stop) | self._schema()
        await self._follow(body, answers, lead=lead, begins=True, final=True)

    async def _in_two(self, choice: int) -> None:
        """One answer: first its thinking, then what is bound."""
        c, remote = self.completion, self.remote
        prompt = await remote.wired(c.prompt)
        limit = remote.room(prompt, c.max_tokens)
        most = limit if c.max_reasoning is None else max(min(limit, c.max_reasoning), 1)
        thought = _Answer(choice)
        await self._follow(self._body(prompt, most, (THINK_END,), choice), [thought], begins=choice == 0, final=False)
        closed = thought.closed if thought.finish == "stop" else thought.finish == "length" and most < limit
        if not closed:
            self.said.put_nowait(Continued(choice, "", None, thought.finish, thought.error))
            return
        lead = self._bound.lead if self._bound is not None else ""
        forced = thought.finish == "length"  # else the upstream has made and counted the end of the thinking
        self.said.put_nowait(Continued(choice, THINK_END + lead, count=int(forced)))
        left = limit - thought.tokens - forced
        if left < 1:
            self.said.put_nowait(Continued(choice, "", None, "length"))
            return
        tail = [Piece("".join(thought.text)), Piece(THINK_END, special=True), *_pieces(lead)]
        prompt = await remote.wired(c.prompt, tail)
        body = self._body(prompt, remote.room(prompt, left), c.stop, choice) | self._schema()
        await self._follow(body, [_Answer(choice)], begins=False, final=True)

    def _body(self, prompt: Wired, max_tokens: int, stop: Sequence[str], choice: int | None = None) -> dict[str, Any]:
        """A request; `choice` is the answer that it is for, or None for all.

        Sampling is sent whole, since llama.cpp has defaults of its own.
        """
        c, remote = self.completion, self.remote
        s = c.sampling
        end = remote.special(EOS)
        banned = [token for text in c.banned if (token := remote.special(text)) is not None]
        bias = {str(token): value for token, value in s.logit_bias.items()} | {str(t): BANNED for t in banned}
        body: dict[str, Any] = {
            "model": remote.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or (-1 if remote.engine in ("vllm", "sglang") else 0),  # SGLang refuses 0
            "min_p": s.min_p,
            "presence_penalty": s.presence_penalty,
            "frequency_penalty": s.frequency_penalty,
            # our parser wants to see them
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "add_special_tokens": False,
        }
        if s.repetition_penalty != 1.0:
            body["repeat_penalty" if remote.engine == "llamacpp" else "repetition_penalty"] = s.repetition_penalty
        if s.seed is not None:
            body["seed"] = s.seed + (choice or 0)
        if bias:
            body["logit_bias"] = bias
        if choice is None and c.n > 1:
            body["n"] = c.n
        # every engine ends at its own EOS; ids are for one that was set up wrongly. Texts are for the same, but vLLM
        # holds an answer back by their length
        if end is not None:
            body["stop_token_ids"] = [end]
        texts = [*stop, *([EOS] if end is None else [])]
        if texts:
            body["stop"] = texts
        if remote.engine == "llamacpp":
            body["preserved_tokens"] = list(SPECIAL_TOKENS)  # its skip_special_tokens
        if self._names or c.score_prompt:
            body |= {"logprobs": c.top_logprobs or 0, "return_tokens_as_token_ids": True, "return_token_ids": True}
        if c.score_prompt:
            body["echo"] = True
        return body

    def _schema(self) -> dict[str, Any]:
        """The fields that bind an answer to JSON."""
        schema = self._bound.schema if self._bound is not None else None
        if schema is None:
            return {}
        if self.remote.engine == "vllm":
            return {"structured_outputs": {"json": schema}}
        if self.remote.engine == "llamacpp":
            return {"json_schema": schema}
        form = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    async def _follow(
        self, body: dict[str, Any], answers: Sequence[_Answer], *, lead: str = "", begins: bool, final: bool
    ) -> None:
        """One request to its end.

        Args:
            lead: what every answer begins with, which stands in the prompt already.
            begins: whether the answers begin with it.
            final: whether they end with it.
        Raises:
            InputError, CapacityError, RunError: the upstream refuses or breaks it.
        """
        remote = self.remote
        asked, top = "logprobs" in body, self.completion.top_logprobs or 0
        total: int | None = None
        over: list[_Answer] = []
        try:
            async with remote.client.stream("POST", f"{remote.url}/v1/completions", json=body) as response:
                if response.status_code != httpx2.codes.OK:
                    await response.aread()
                    raise refusal(response.status_code, response.text, remote.context)
                if not asked:  # else its first words may be reason to refuse
                    self._accept(body["prompt"], answers, lead)
                async for event in httpx2.EventSource(response, EVENT_BYTES):
                    if event.data == DONE:
                        break
                    chunk = Chunk.read(event.data)
                    for choice in chunk.choices:
                        if not 0 <= choice.index < len(answers):
                            raise RunError(f"{remote.url} sent an answer {choice.index} that nobody asked for")
                        answer = answers[choice.index]
                        if answer.finish is not None:
                            continue
                        infos = choice.infos(top) if asked else []
                        self._accept(body["prompt"], answers, lead)
                        self._grow(answer, body["prompt"], infos, choice, chunk)
                        if choice.finish_reason is not None:
                            _end(answer, choice)
                            over.append(answer)
                            if final and len(over) < len(answers):  # the last one waits for the usage
                                self._over(answer)
                    if begins:
                        self._used(chunk)
                    if chunk.usage is not None and not chunk.choices:
                        total = chunk.usage.completion_tokens
        except httpx2.HTTPError as error:
            if len(over) < len(answers):
                raise RunError(f"{remote.url} does not answer ({error or type(error).__name__}): try again") from None
        if len(over) < len(answers):
            raise RunError(f"{remote.url} ended its stream before the answer was over: try again")
        last = over[-1]
        rest = max((total or 0) - sum(answer.tokens for answer in answers), 0)
        last.tokens += rest
        if final:
            self._over(last, rest)
        elif rest:
            self.said.put_nowait(Continued(last.choice, "", count=rest))

    def _accept(self, prompt: Wired, answers: Sequence[_Answer], lead: str) -> None:
        """Say so, once, and what is known of the prompt."""
        if self._accepted:
            return
        self._accepted = True
        self.said.put_nowait(Accepted())
        if not isinstance(prompt, str) and not self.completion.score_prompt:
            # ids without a tokenizer have no texts to show
            ids = tuple(prompt) if self.completion.trace and self.remote.tokenizer is not None else ()
            self._say_use(PromptUse(len(prompt), 0, UNREPORTED, ids))
        if lead:
            for answer in answers:
                self.said.put_nowait(Continued(answer.choice, lead, count=0))

    def _used(self, chunk: Chunk) -> None:
        """What the upstream says of the prompt, which may come before, with or behind the answer."""
        if chunk.usage is None or self.completion.score_prompt:  # that was said with the scores
            return
        reason = UNREPORTED if chunk.cached is None else ""
        use = self._use or PromptUse(0, 0)
        self._say_use(replace(use, tokens=chunk.usage.prompt_tokens, cached=chunk.cached or 0, reason=reason))

    def _say_use(self, use: PromptUse) -> None:
        if use != self._use:
            self._use = use
            self.said.put_nowait(use)

    def _grow(
        self, answer: _Answer, prompt: Wired, infos: list[TokenInfo | None], choice: Choice, chunk: Chunk
    ) -> None:
        """More of an answer."""
        text = choice.text or ""
        if self.completion.score_prompt and not answer.echoed:
            answer.echoed = True
            scores, infos = tuple(infos[: len(prompt)]), infos[len(prompt) :]
            if self._use is None:
                ids = tuple(prompt) if not isinstance(prompt, str) else ()
                self._say_use(PromptUse(len(ids), 0, UNREPORTED, ids, scores))
            text = self.remote.decode([info.token for info in infos if info is not None])
        named = [info for info in infos if info is not None]
        count = len(named) or len(choice.token_ids or ())
        if not count and chunk.usage is not None and chunk.usage.completion_tokens is not None:
            count = max(chunk.usage.completion_tokens - answer.tokens, 0)  # of this answer so far
        elif not count:
            count = int(bool(text))  # at least; the usage has the sum
        answer.tokens += count
        answer.text.append(text)
        for info in named[:-1]:
            self.said.put_nowait(Continued(answer.choice, "", info))
        if named:
            self.said.put_nowait(Continued(answer.choice, text, named[-1]))
        elif text or count:
            self.said.put_nowait(Continued(answer.choice, text, count=count))

    def _over(self, answer: _Answer, rest: int = 0) -> None:
        self.said.put_nowait(Continued(answer.choice, "", None, answer.finish, answer.error, rest))


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


@cache
def _verify() -> ssl.SSLContext:
    """Whom to trust; reading that takes longer than a request."""
    return httpx2.create_ssl_context()


def _options(key: str | None, timeout: httpx2.Timeout) -> dict[str, Any]:
    """Of a client; proxies are for the web, an engine is near."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return {"headers": headers, "timeout": timeout, "verify": _verify(), "trust_env": False}


def _pieces(lead: str) -> list[Piece]:
    """A template's text as pieces."""
    parts = re.split(f"({re.escape(DSML)})", lead)
    return [Piece(part, special=part == DSML) for part in parts if part]


def _end(answer: _Answer, choice: Choice) -> None:
    """Take in how an answer ended."""
    reason = choice.finish_reason or ""
    answer.finish = FINISH.get(reason, "failed")
    if answer.finish == "failed":
        answer.error = f"the upstream ended the answer with {reason!r}"
    answer.closed = choice.closed and not "".join(answer.text[-2:]).endswith(EOS)
