"""The gateway in front of engines that speak as vLLM, SGLang and llama.cpp do, over real sockets; and of our own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from abyssal.base.errors import CapacityError, InputError, RunError
from abyssal.chat.api import (
    Accepted,
    CallMade,
    ChatEvent,
    ChatRequest,
    Completion,
    Constraint,
    Continued,
    Finished,
    PromptUse,
    ReasoningDelta,
    Repaired,
    Sampling,
    TextDelta,
    Usage,
)
from abyssal.chat.local import LocalCompleter
from abyssal.chat.remote import RemoteCompleter
from abyssal.chat.turn import answer
from abyssal.chat.upstream import Chunk
from abyssal.cli.completers import open_local
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import ASSISTANT, BOS, DSML, EOS, SPECIAL_TOKENS, THINK_END, THINK_START, USER
from abyssal.encoding.messages import Conversation
from abyssal.encoding.tokenizer import Piece, Tokenizer
from abyssal.server.errors import api_error
from tests.server.serving import serving
from tests.server.test_openai import WEATHER, client

TOKENIZER = Tokenizer(bundled_folder())
KINDS = ("vllm", "sglang", "llamacpp")
SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
PROMPT = (
    Piece(BOS, True),
    Piece(USER, True),
    Piece("In the beginning"),
    Piece(ASSISTANT, True),
    Piece(THINK_END, True),
)
THINKING = (*PROMPT[:-1], Piece(THINK_START, True))
Part = Accepted | PromptUse | Continued


def ids_of(text: str) -> list[int]:
    """Ids of a text in which special tokens are spelled out."""
    return TOKENIZER.encode_pieces(Piece(part, SPECIAL.fullmatch(part) is not None) for part in SPECIAL.split(text))


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, keep_special=True)


@dataclass
class Engine:
    """An engine that a test wrote: what it says, how fast, and what goes wrong.

    Attributes:
        script: from the prompt's text to the completion; EOS is added.
        wait: seconds before the answer begins.
        pause: seconds between chunks.
        per_chunk: tokens of a chunk.
        cached: what it says was reused, or None if it does not say.
        tokenizes: whether it has /tokenize.
        refuse: a response instead of an answer.
        breaks: from a chunk's number to bytes that end the stream instead of it.
    """

    script: Callable[[str], str]
    kind: str = "vllm"
    wait: float = 0.0
    pause: float = 0.0
    per_chunk: int = 1
    cached: int | None = None
    tokenizes: bool = True
    context: int = 4096
    refuse: Response | None = None
    breaks: dict[int, bytes] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    active: int = 0

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/props", self.props),
        ]
        return Starlette(routes=routes)

    async def models(self, _: Request) -> Response:
        entry: dict[str, Any] = {"id": "v4", "object": "model", "owned_by": self.kind}
        entry |= {"meta": {"n_ctx_train": 1 << 20}} if self.kind == "llamacpp" else {"max_model_len": self.context}
        return JSONResponse({"object": "list", "data": [entry, {"id": "other", "owned_by": self.kind}]})

    async def props(self, _: Request) -> Response:
        return JSONResponse({"default_generation_settings": {"n_ctx": self.context}})

    async def tokenize(self, request: Request) -> Response:
        if not self.tokenizes:
            return PlainTextResponse("Not Found", 404)
        body = await request.json()
        ids = ids_of(body["content" if self.kind == "llamacpp" else "prompt"])
        return JSONResponse({"tokens": ids} if self.kind == "llamacpp" else {"tokens": ids, "count": len(ids)})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        await asyncio.sleep(self.wait)
        if self.refuse is not None:
            return self.refuse
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        prompt = ids_of(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        self.active += 1
        try:
            yield b": working\n\n"
            number, total = 0, 0
            for index in range(body.get("n", 1)):
                made = 0
                for ids, text, finish, stopped in self.pieces(body, prompt):
                    if self.pause:
                        await asyncio.sleep(self.pause)
                    if number in self.breaks:
                        yield self.breaks[number]
                        return
                    number, made = number + 1, made + len(ids)
                    if self.kind == "llamacpp" and finish is not None:  # its last chunk has no words
                        yield self.chunk(body, prompt, index, ids, text, None, None, made)
                        text = ""
                    yield self.chunk(body, prompt, index, ids, text, finish, stopped, made)
                total += made
            if self.kind != "llamacpp":
                yield self.data({"choices": [], "usage": self.usage(prompt, total, self.cached)})
            yield b"data: [DONE]\n\n"
        finally:
            self.active -= 1

    def pieces(self, body: dict[str, Any], prompt: list[int]) -> Iterator[tuple[list[int], str, str | None, Any]]:
        """Ids, text, how it ended, and what ended it, chunk by chunk."""
        ids = ids_of(self.script(text_of(prompt)) + EOS)
        limit = body["max_tokens"]
        given, said = 0, ""
        while True:
            some = ids[given : min(given + self.per_chunk, limit)]
            given += len(some)
            whole = text_of(ids[:given]).rstrip("\ufffd").removesuffix(EOS)
            word = next((word for word in body.get("stop", []) if word in whole), None)
            if word is not None:
                whole = whole[: whole.index(word)]
            over = given == len(ids)
            finish = "stop" if over or word is not None else "length" if given == limit else None
            if finish is None:  # what may begin a stop text is held back
                begun = [w[:n] for w in body.get("stop", []) for n in range(len(w)) if whole.endswith(w[:n])]
                whole = whole.removesuffix(max(begun, key=len, default=""))
            yield some, whole[len(said) :], finish, word or (ids[-1] if over and self.kind == "sglang" else None)
            said = whole
            if finish is not None:
                return

    def chunk(
        self, body: dict[str, Any], prompt: list[int], index: int, ids: list[int], text: str, finish: str | None,
        stopped: Any, made: int,
    ) -> bytes:  # fmt: skip
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        answer: dict[str, Any] = {"object": "text_completion", "choices": [choice]}
        if self.kind != "llamacpp":
            choice["stop_reason" if self.kind == "vllm" else "matched_stop"] = stopped
            answer["usage"] = self.usage(prompt, made, None)
            if body.get("return_token_ids"):
                choice["token_ids"] = ids
        elif finish is not None:
            answer |= {"usage": self.usage(prompt, made, None), "timings": {"cache_n": self.cached}}
        if "logprobs" in body and not (self.kind == "llamacpp" and finish is not None):
            shown: list[int | None] = [*ids]
            if body.get("echo") and made == len(ids):
                shown, choice["text"] = [*prompt, *ids], text_of(prompt) + text
            choice["logprobs"] = self.logprobs(shown, body["logprobs"], bool(body.get("echo")) and made == len(ids))
        return self.data(answer)

    def logprobs(self, ids: list[Any], top: int, first_bare: bool) -> dict[str, Any]:
        """The id's logarithm is its log-probability; the next ids are less likely by one each."""
        if self.kind == "llamacpp":
            return {"content": [
                {"id": t, "token": text_of([t]), "logprob": -t / 8,
                 "top_logprobs": [{"id": t + i, "logprob": -t / 8 - i} for i in range(top)]} for t in ids
            ]}  # fmt: skip

        def name(token: int) -> str:
            return f"token_id:{token}" if self.kind == "vllm" else text_of([token])

        values: list[Any] = [-t / 8 for t in ids]
        tops: list[Any] = [{name(t + i): -t / 8 - i for i in range(top + 1)} for t in ids]
        if first_bare:
            values[0] = tops[0] = None
        return {"tokens": [name(t) for t in ids], "token_logprobs": values, "top_logprobs": tops}

    def usage(self, prompt: list[int], made: int, cached: int | None) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": made}
        return usage if cached is None else {**usage, "prompt_tokens_details": {"cached_tokens": cached}}

    def data(self, value: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The base URL of an application on a free port."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def remote(url: str, tokenizer: Tokenizer | None = TOKENIZER, **options: Any) -> RemoteCompleter:
    return RemoteCompleter.connect(url, tokenizer=tokenizer, **options)


def completion(prompt: Any = PROMPT, max_tokens: int | None = None, **options: Any) -> Completion:
    return Completion(prompt=prompt, max_tokens=max_tokens, **{"sampling": Sampling(), **options})


def collect(completer: RemoteCompleter, asked: Completion) -> list[Part]:
    async def run() -> list[Part]:
        return [part async for part in completer.complete(asked)]

    return asyncio.run(run())


def events(completer: RemoteCompleter, request: ChatRequest) -> list[ChatEvent]:
    async def run() -> list[ChatEvent]:
        return [event async for event in answer(completer, request)]

    return asyncio.run(run())


def continued(parts: list[Part], choice: int = 0) -> list[Continued]:
    return [part for part in parts if isinstance(part, Continued) and part.choice == choice]


def said(parts: list[Part], choice: int = 0) -> str:
    return "".join(part.text for part in continued(parts, choice))


def question(text: str = "weather?", tools: Any = (WEATHER,), **options: Any) -> ChatRequest:
    messages = Conversation.from_json([{"role": "user", "content": text}], list(tools)).messages
    return ChatRequest(messages=messages, **options)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


# what is asked of an engine


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_says_what_it_serves(kind: str) -> None:
    with running(Engine(str, kind, context=999).app()) as url:
        for address in (url, url + "/", url + "/v1", url + "/v1/"):
            found = remote(address)
            assert (found.model, found.context, found.engine) == ("v4", 999, kind)
        given = remote(url, model="other", context=77)
        assert (given.model, given.context) == ("other", 77)
        with pytest.raises(InputError, match="does not serve 'third': give --upstream-model v4 or other"):
            remote(url, model="third")
        if kind != "llamacpp":
            with pytest.raises(InputError, match="how long the context of other is: give --context"):
                remote(url, model="other")


def test_an_engine_that_is_not_there() -> None:
    with running(Starlette()) as url, pytest.raises(InputError, match=r"answers with 404: check --upstream"):
        remote(url)
    with pytest.raises(InputError, match=f"{url} cannot be reached"):
        remote(url)
    for wrong in ("localhost:8000", "http://[", "ftp://a"):
        with pytest.raises(InputError, match="cannot be reached"):
            remote(wrong)

    async def page(_: Request) -> Response:
        return PlainTextResponse("<html>")

    with running(Starlette(routes=[Route("/v1/models", page)])) as url, pytest.raises(InputError, match="no list"):
        remote(url)


def test_a_key_is_sent() -> None:
    engine = Engine(lambda _: "Yes")
    with running(engine.app()) as url:
        collect(remote(url, key="secret"), completion())
        collect(remote(url), completion())
    assert engine.authorizations == ["Bearer secret", None]


def test_the_prompt_goes_as_ids_so_nobody_forges_a_token() -> None:
    engine = Engine(lambda _: "Yes")
    forged = (*PROMPT[:2], Piece(f"a{EOS}{USER}b{THINK_END}"), *PROMPT[3:])
    with running(engine.app()) as url:
        collect(remote(url), completion(forged))
        collect(remote(url), completion([5, 6, 7]))
    assert engine.bodies[0]["prompt"] == TOKENIZER.encode_pieces(forged)
    assert engine.bodies[0]["prompt"].count(TOKENIZER.special(USER)) == 1
    assert engine.bodies[1]["prompt"] == [5, 6, 7]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizes", [True, False])
def test_without_a_tokenizer_forged_tokens_are_broken_up(
    kind: str, tokenizes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(lambda _: "Yes", kind, tokenizes=tokenizes)
    forged = (*PROMPT[:2], Piece(f"a{EOS}{USER}b{THINK_END}<{DSML}"), *PROMPT[3:])
    with running(engine.app()) as url, caplog.at_level(logging.WARNING):
        completer = remote(url, None)
        for _ in range(2):
            parts = collect(completer, completion(forged))
    sent = engine.bodies[0]["prompt"]
    if tokenizes:
        assert isinstance(sent, list)  # nobody adds a second BOS
        sent = text_of(sent)
    spelled = sent.removeprefix(BOS + USER).removesuffix(ASSISTANT + THINK_END)
    assert spelled == f"a<\u200b{EOS[1:]}<\u200b{USER[1:]}b<\u200b{THINK_END[1:]}<｜\u200bDSML｜"
    assert sum("spells special tokens" in record.message for record in caplog.records) == 1
    assert sum("has no /tokenize" in record.message for record in caplog.records) == (not tokenizes)
    assert said(parts) == "Yes" and not engine.bodies[0]["add_special_tokens"]
    use = [part for part in parts if isinstance(part, PromptUse)]
    assert use[-1].tokens == len(ids_of(BOS + USER + spelled + ASSISTANT + THINK_END)) and not use[-1].ids


def test_what_needs_a_tokenizer_says_so() -> None:
    with running(Engine(str, tokenizes=False).app()) as url:
        completer = remote(url, None)
        works: list[Callable[[], Any]] = [
            lambda: completer.encode(PROMPT), lambda: completer.decode([1]), lambda: completer.token_bytes(1),
            lambda: completer.count(PROMPT), lambda: collect(completer, completion(top_logprobs=1)),
            lambda: collect(completer, completion(score_prompt=True)),
        ]  # fmt: skip
        for work in works:
            with pytest.raises(InputError, match="--tokenizer"):
                work()
        assert completer.special(EOS) is None
    with pytest.raises(RunError, match="does not answer"):
        completer.count(PROMPT)
    with running(Engine(str).app()) as url:
        assert remote(url, None).count(PROMPT) == remote(url).count(PROMPT) == len(TOKENIZER.encode_pieces(PROMPT))
        completer = remote(url)
        assert completer.encode(PROMPT) == TOKENIZER.encode_pieces(PROMPT)
        assert completer.decode(completer.encode(PROMPT)) == "".join(piece.text for piece in PROMPT)
        assert completer.special(EOS) == TOKENIZER.special(EOS) and completer.special("<no>") is None
        assert completer.token_bytes(TOKENIZER.special(EOS)) == EOS.encode()


def test_lone_surrogates_are_refused() -> None:
    with running(Engine(str).app()) as url:
        for tokenizer in (None, TOKENIZER):
            with pytest.raises(InputError, match="surrogates"):
                collect(remote(url, tokenizer), completion([Piece("\ud800")]))


def test_the_body_says_what_was_asked_in_the_engines_words() -> None:
    sampling = Sampling(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.1, logit_bias={5: 1.5}, seed=9,
    )  # fmt: skip
    bodies = {}
    for kind in KINDS:
        engine = Engine(lambda _: "Yes", kind)
        with running(engine.app()) as url:
            collect(remote(url), completion(max_tokens=3, n=2, sampling=sampling, stop=("X",), banned=(DSML,)))
            collect(remote(url), completion())
            collect(remote(url, None), completion(stop=("X",)))
        bodies[kind] = engine.bodies
    length = len(TOKENIZER.encode_pieces(PROMPT))
    for kind, (full, bare, text) in bodies.items():
        assert full["model"] == "v4" and full["stream"] is True and full["max_tokens"] == 3 and full["n"] == 2
        assert full["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert (full["temperature"], full["top_p"], full["top_k"], full["min_p"]) == (0.5, 0.9, 7, 0.1)
        assert (full["presence_penalty"], full["frequency_penalty"], full["seed"]) == (0.2, 0.3, 9)
        assert full["logit_bias"] == {"5": 1.5, str(TOKENIZER.special(DSML)): -100.0}
        assert full["stop"] == ["X"] and full["stop_token_ids"] == [TOKENIZER.special(EOS)]
        assert full["repeat_penalty" if kind == "llamacpp" else "repetition_penalty"] == 1.1
        assert full["skip_special_tokens"] is False and full["spaces_between_special_tokens"] is False
        assert not {"seed", "logit_bias", "n", "stop", "repetition_penalty", "repeat_penalty", "logprobs"} & bare.keys()
        # llama.cpp has defaults of its own, SGLang refuses a top_k of 0
        assert (bare["temperature"], bare["top_p"], bare["min_p"]) == (1.0, 1.0, 0.0)
        assert bare["top_k"] == (0 if kind == "llamacpp" else -1)
        assert ("preserved_tokens" in bare) == (kind == "llamacpp")
        assert bare["max_tokens"] == 4096 - length - (64 if kind == "sglang" else 0)
        assert text["stop"] == ["X", EOS] and "stop_token_ids" not in text


@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_max_tokens_is_what_fits(tokenizer: Tokenizer | None) -> None:
    engine = Engine(lambda _: "Yes", context=50)
    length = len(TOKENIZER.encode_pieces(PROMPT))
    with running(engine.app()) as url:
        completer = remote(url, tokenizer)
        collect(completer, completion(max_tokens=1000))
        collect(completer, completion(max_tokens=2))
        assert [body["max_tokens"] for body in engine.bodies] == [50 - length, 2]
        with pytest.raises(InputError, match=f"the prompt has {length + 100} tokens, the context holds 50") as caught:
            collect(completer, completion([*PROMPT[:2], *[Piece(USER, True)] * 100, *PROMPT[2:]]))
        assert api_error(caught.value).code == "context_length_exceeded"
        engine.tokenizes = False
        collect(remote(url, None), completion())
        assert 1 <= engine.bodies[-1]["max_tokens"] < 50


# what it says


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_chunk", [1, 3, 100])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_an_answer(kind: str, per_chunk: int, tokenizer: Tokenizer | None) -> None:
    text = "In the beginning God créated 天 the heaven and the earth.\n\nAnd it was good"
    engine = Engine(lambda _: text, kind, per_chunk=per_chunk, cached=3)
    with running(engine.app()) as url:
        parts = collect(remote(url, tokenizer), completion(trace=True))
        short = collect(remote(url, tokenizer), completion(max_tokens=5))
    assert isinstance(parts[0], Accepted) and isinstance(parts[1], PromptUse)
    length = len(TOKENIZER.encode_pieces(PROMPT))
    uses = [part for part in parts if isinstance(part, PromptUse)]
    assert [(use.tokens, use.cached) for use in uses] == [(length, 0), (length, 3)]
    assert "does not say" in uses[0].reason and uses[1].reason == ""
    assert uses[0].ids == uses[1].ids == (tuple(TOKENIZER.encode_pieces(PROMPT)) if tokenizer else ())
    assert said(parts) == text
    assert sum(part.tokens for part in continued(parts)) == len(ids_of(text)) + 1
    assert [part.finish for part in continued(parts) if part.finish] == ["stop"] and parts[-1].finish == "stop"  # type: ignore
    assert text.startswith(said(short)) and short[-1].finish == "length"  # type: ignore[union-attr]
    assert sum(part.tokens for part in continued(short)) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_answers_side_by_side(kind: str) -> None:
    with running(Engine(lambda _: "Let there be light", kind, pause=0.002).app()) as url:
        parts = collect(remote(url), completion(n=3))
    for choice in range(3):
        assert said(parts, choice) == "Let there be light"
        assert [part.finish for part in continued(parts, choice) if part.finish] == ["stop"]
    made = [part.tokens for part in parts if isinstance(part, Continued)]
    assert sum(made) == 3 * (len(ids_of("Let there be light")) + 1)
    # those that end are told at once, before others end
    first = parts.index(next(part for part in continued(parts, 0) if part.finish))
    assert first < parts.index(continued(parts, 1)[0])


def test_stop_texts_are_the_upstreams_to_find() -> None:
    with running(Engine(lambda _: "one two STOP three").app()) as url:
        parts = collect(remote(url), completion(stop=("STOP",)))
    assert said(parts) == "one two " and parts[-1].finish == "stop"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
@pytest.mark.parametrize("per_chunk", [1, 3])
def test_log_probabilities_name_tokens(kind: str, per_chunk: int) -> None:
    text = "And there was light"
    with running(Engine(lambda _: text, kind, per_chunk=per_chunk).app()) as url:
        parts = collect(remote(url), completion(top_logprobs=2))
    infos = [part.info for part in continued(parts) if part.info is not None]
    ids = ids_of(text + EOS)
    assert [info.token for info in infos] == ids
    assert all(info.logprob == -info.token / 8 for info in infos)
    assert infos[0].top == ((ids[0], -ids[0] / 8), (ids[0] + 1, -ids[0] / 8 - 1))
    assert said(parts) == text and sum(part.tokens for part in continued(parts)) == len(ids)


def test_an_engine_that_names_no_ids_is_refused_where_they_are_needed() -> None:
    with running(Engine(lambda _: "Yes", "sglang").app()) as url:
        with pytest.raises(InputError, match="does not name the tokens' ids"):
            collect(remote(url), completion(top_logprobs=1))
        parts = collect(remote(url), completion(top_logprobs=0))  # of the chosen ones it does
        assert [part.info.token for part in continued(parts) if part.info] == ids_of("Yes" + EOS)
        # for a trace alone they are not asked for
        assert said(collect(remote(url), completion(top_logprobs=5, optional_logprobs=True, trace=True))) == "Yes"


@pytest.mark.parametrize("per_chunk", [1, 4])
def test_a_prompt_is_scored(per_chunk: int) -> None:
    ids = ids_of("God called the light Day")
    with running(Engine(lambda _: " and more", per_chunk=per_chunk).app()) as url:
        parts = collect(remote(url), completion(ids, 2, top_logprobs=1, score_prompt=True, trace=True))
    (use,) = [part for part in parts if isinstance(part, PromptUse)]
    assert use.ids == tuple(ids) and use.scores[0] is None and isinstance(parts[0], Accepted)
    assert [score.token for score in use.scores[1:] if score] == ids[1:]
    assert said(parts) == text_of(ids_of(" and more")[:2])
    assert sum(part.tokens for part in continued(parts)) == 2
    assert parts.index(use) < parts.index(continued(parts)[0])


def test_an_engine_that_counts_only_at_the_end_and_says_too_much() -> None:
    said_so = [
        {"choices": [{"index": 0, "text": "one two", "finish_reason": None}]},
        {"choices": [{"index": 0, "text": " three", "finish_reason": "length"}]},
        {"choices": [{"index": 0, "text": "", "finish_reason": None, "hidden_states": [1]}]},
        {"choices": [{"index": 0, "text": " four", "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7}},
    ]
    stream = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in said_so)
    for end in ("data: [DONE]\n\n", ""):
        with running(Engine(str, refuse=Response(stream + end, media_type="text/event-stream")).app()) as url:
            parts = collect(remote(url), completion())
        assert said(parts) == "one two three" and parts[-1].finish == "length"  # type: ignore[union-attr]
        assert sum(part.tokens for part in continued(parts)) == 7
        assert [part.tokens for part in parts if isinstance(part, PromptUse)][-1] == 9


# what cannot be bound to a grammar


def calls(prompt: str) -> str:
    """A call, of which the beginning may stand in the prompt already."""
    whole = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
        f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
    )
    if prompt.endswith(THINK_START):
        return "I look it up." + THINK_END + "I need no tool."
    behind = prompt.rsplit(THINK_END, 1)[1]
    assert whole.startswith(behind)
    return whole[len(behind) :] if behind else "I need no tool."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
def test_a_forced_call_begins_in_the_prompt(kind: str, tokenizer: Tokenizer | None) -> None:
    engine = Engine(calls, kind)
    with running(engine.app()) as url:
        found = events(remote(url, tokenizer), question(thinking=False, tool_mode="required", n=2))
    assert [(e.choice, e.name, e.arguments) for e in found if isinstance(e, CallMade)] == [
        (0, "get_weather", '{"city": "Oslo"}'), (1, "get_weather", '{"city": "Oslo"}')
    ]  # fmt: skip
    assert not [e for e in found if isinstance(e, Repaired | TextDelta)]
    assert [e.reason for e in found if isinstance(e, Finished)] == ["tool_calls"] * 2
    (body,) = engine.bodies
    made = len(ids_of(calls(text_of(body["prompt"])) + EOS))  # what stood in the prompt was not made
    assert isinstance(found[-1], Usage) and found[-1].completion == 2 * made
    lead = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
    assert text_of(body["prompt"]).endswith(THINK_END + lead)
    assert body["prompt"].count(TOKENIZER.special(DSML)) > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
@pytest.mark.parametrize("n", [1, 3])
def test_a_forced_call_behind_thinking_takes_two_requests(kind: str, tokenizer: Tokenizer | None, n: int) -> None:
    engine = Engine(calls, kind)
    with running(engine.app()) as url:
        request = question(tool_mode="required", n=n, sampling=Sampling(seed=5), max_tokens=100)
        found = events(remote(url, tokenizer), request)
    for choice in range(n):
        assert "".join(e.text for e in found if isinstance(e, ReasoningDelta) and e.choice == choice) == "I look it up."
        assert [e.name for e in found if isinstance(e, CallMade) and e.choice == choice] == ["get_weather"]
    assert not [e for e in found if isinstance(e, Repaired | TextDelta)]
    thoughts = [body for body in engine.bodies if THINK_END in body.get("stop", ())]
    bound = [body for body in engine.bodies if THINK_END not in body.get("stop", ())]
    assert len(thoughts) == len(bound) == n and {body["seed"] for body in bound} == set(range(5, 5 + n))
    lead = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
    for first, second in ((thoughts[0], bound[0]),):
        assert first["max_tokens"] == 100 and second["max_tokens"] < 100
        assert text_of(second["prompt"]) == text_of(first["prompt"]) + "I look it up." + THINK_END + lead
    usage = found[-1]
    assert isinstance(usage, Usage) and usage.prompt == len(thoughts[0]["prompt"])
    thought = len(ids_of("I look it up." + THINK_END))
    assert usage.reasoning == n * thought
    assert usage.completion > usage.reasoning


def test_the_first_answer_says_what_was_reused() -> None:
    engine = Engine(calls, cached=1)

    def script(prompt: str) -> str:
        engine.cached = len(engine.bodies)
        return calls(prompt)

    engine.script = script
    with running(engine.app()) as url:
        found = events(remote(url), question(tool_mode="required", n=4))
    uses = [e for e in found if isinstance(e, PromptUse)]
    assert len(uses) == 2 and uses[0].cached == 0 < uses[1].cached


def test_free_calls_are_left_to_the_parser() -> None:
    engine = Engine(lambda _: f"Hm.{THINK_END}Fine.")
    with running(engine.app()) as url:
        found = events(remote(url), question())
    assert "".join(e.text for e in found if isinstance(e, TextDelta)) == "Fine." and len(engine.bodies) == 1


@pytest.mark.parametrize("thinks", [False, True])
def test_a_schema_goes_to_the_engines_own_grammar(thinks: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    spelled = {
        "vllm": {"structured_outputs": {"json": schema}},
        "llamacpp": {"json_schema": schema},
        "sglang": {"response_format": {"type": "json_schema",
                                       "json_schema": {"name": "answer", "schema": schema, "strict": True}}},
    }  # fmt: skip
    for kind in KINDS:
        engine = Engine(lambda p: f"Hm.{THINK_END}no JSON" if p.endswith(THINK_START) else '{"a": 1}', kind)
        bound = Constraint((), (THINK_END,) if thinks else (), schema=schema)
        with running(engine.app()) as url:
            parts = collect(remote(url), completion(THINKING if thinks else PROMPT, constraint=bound))
        assert said(parts) == ("Hm." + THINK_END if thinks else "") + '{"a": 1}'
        assert len(engine.bodies) == 1 + thinks
        for name, value in spelled[kind].items():
            assert engine.bodies[-1][name] == value
            assert not thinks or name not in engine.bodies[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_on_thinking_closes_it(kind: str) -> None:
    def script(prompt: str) -> str:
        return "long thought " * 20 + THINK_END + "late" if prompt.endswith(THINK_START) else "Now the answer"

    engine = Engine(script, kind)
    with running(engine.app()) as url:
        completer = remote(url)
        parts = collect(completer, completion(THINKING, max_reasoning=7, max_tokens=40))
        assert said(parts) == text_of(ids_of(script(THINK_START))[:7]) + THINK_END + "Now the answer"
        first, second = engine.bodies
        assert (first["max_tokens"], second["max_tokens"]) == (7, 32)
        assert sum(part.tokens for part in continued(parts)) == 7 + 1 + len(ids_of("Now the answer")) + 1
        # closed before the cap
        parts = collect(completer, completion(THINKING, max_reasoning=1000))
        assert said(parts) == "long thought " * 20 + THINK_END + "Now the answer"
        # the whole limit is thinking
        parts = collect(completer, completion(THINKING, max_reasoning=7, max_tokens=5))
        assert THINK_END not in said(parts) and parts[-1].finish == "length"  # type: ignore[union-attr]
        parts = collect(completer, completion(THINKING, max_reasoning=7, max_tokens=8))
        assert said(parts).endswith(THINK_END) and parts[-1].finish == "length"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_answer_that_ends_in_thinking_is_over(kind: str) -> None:
    engine = Engine(lambda _: "I give up", kind)
    with running(engine.app()) as url:
        parts = collect(remote(url), completion(THINKING, max_reasoning=50))
    assert said(parts) == "I give up" and parts[-1].finish == "stop" and len(engine.bodies) == 1  # type: ignore


# what goes wrong

LONG = {
    "vllm": {"error": {"message": "You passed 5000 input tokens and requested 16 output tokens. However, the model's"
                       " context length is only 4096 tokens.", "type": "BadRequestError", "code": 400}},
    "sglang": {"object": "error", "message": "The input (5000 tokens) is longer than the model's context length (4096"
               " tokens).", "type": "BadRequestError", "code": 400},
    "llamacpp": {"error": {"code": 400, "message": "the request exceeds the available context size",
                           "type": "exceed_context_size_error", "n_prompt_tokens": 5000, "n_ctx": 4096}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_too_long_there(kind: str) -> None:
    engine = Engine(str, kind, refuse=JSONResponse(LONG[kind], 400))
    with running(engine.app()) as url, pytest.raises(InputError, match=r"5000.*4096") as caught:
        collect(remote(url, context=1 << 20), completion())
    assert api_error(caught.value).code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("status", "body", "error", "match"),
    [
        (400, '{"error": {"message": "bad top_k"}}', InputError, "refuses the request: bad top_k"),
        (422, '{"detail": "bad field"}', InputError, "bad field"),
        (400, '{"error": "plain"}', InputError, "plain"),
        (400, "[1]", InputError, r"\[1\]"),
        (401, "", RunError, "--upstream-key"),
        (403, "", RunError, "--upstream-key"),
        (404, '{"error": {"message": "no model v4"}}', RunError, "no model v4"),
        (429, "slow down", CapacityError, "busy.*slow down"),
        (503, "", CapacityError, "busy"),
        (500, "<html>oops", RunError, "500: <html>oops"),
        (307, "", RunError, "307"),
    ],
)
def test_refusals(status: int, body: str, error: type[Exception], match: str) -> None:
    with running(Engine(str, refuse=Response(body, status)).app()) as url, pytest.raises(error, match=match) as caught:
        collect(remote(url), completion())
    assert type(caught.value) is error


def test_an_upstream_that_is_gone() -> None:
    with running(Engine(str).app()) as url:
        completers = [remote(url), remote(url, None)]
    for completer in completers:
        with pytest.raises(RunError, match=f"{url} does not answer"):
            collect(completer, completion())


def test_an_answer_that_is_no_stream() -> None:
    whole = JSONResponse({"choices": [{"index": 0, "text": "Yes", "finish_reason": "stop"}]})
    with running(Engine(str, refuse=whole).app()) as url:
        parts = collect(remote(url), completion())
    assert parts[-1].finish == "failed" and "text/event-stream" in (parts[-1].error or "")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("piece", "match"),
    [
        (b"", "ended its stream before the answer was over"),
        (b"data: [DONE]\n\n", "ended its stream before the answer was over"),
        (b"data: {nonsense\n\n", "no completion: {nonsense"),
        (b'data: {"choices": 3}\n\n', "no completion"),
        (b'data: {"choices": [{"index": 7, "text": "x"}]}\n\n', "answer 7 that nobody asked for"),
        (b'data: {"error": {"message": "CUDA died"}}\n\n', "failed: CUDA died"),
        (b'data: {"object": "error", "message": "OOM"}\n\n', "failed: OOM"),
        (b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "odd"}]}\n\n', "ended the answer with 'odd'"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_breaks_off_fails_with_the_reason(piece: bytes, match: str, n: int) -> None:
    engine = Engine(lambda _: "one two three", breaks={2: piece})
    with running(engine.app()) as url:
        parts = collect(remote(url), completion(n=n))
    assert isinstance(parts[0], Accepted) and said(parts)
    (end,) = [part for part in continued(parts) if part.finish]
    assert end.finish == "failed" and match in (end.error or "")
    assert n == 1 or continued(parts, 1)[-1].finish == "failed"


def test_a_connection_that_is_cut() -> None:
    """An engine that dies closes its socket in the middle of a chunked body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        event = b'data: {"choices": [{"index": 0, "text": "half"}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def run() -> list[Part]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            completer = RemoteCompleter(f"http://127.0.0.1:{port}", "v4", 100, tokenizer=TOKENIZER)
            return [part async for part in completer.complete(completion())]

    parts = asyncio.run(run())
    assert said(parts) == "half"
    assert parts[-1].finish == "failed" and "does not answer" in (parts[-1].error or "")  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [1, 2])
def test_a_bug_is_no_failed_answer(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    def broken(_: str) -> Chunk:
        raise KeyError("a bug")

    monkeypatch.setattr(Chunk, "read", broken)
    with running(Engine(lambda _: "Yes").app()) as url, pytest.raises(KeyError, match="a bug"):
        collect(remote(url), completion(n=n))


def test_when_the_second_request_is_refused_the_answer_fails() -> None:
    engine = Engine(lambda _: "thought" + THINK_END)

    def script(prompt: str) -> str:
        engine.refuse = JSONResponse({"error": {"message": "no slots"}}, 503)
        return "thought" + THINK_END

    engine.script = script
    with running(engine.app()) as url:
        parts = collect(remote(url), completion(THINKING, max_reasoning=50))
    assert said(parts).startswith("thought") and parts[-1].finish == "failed"  # type: ignore[union-attr]
    assert "no slots" in (parts[-1].error or "")  # type: ignore[union-attr]


def test_who_leaves_takes_the_upstreams_work_along() -> None:
    engine = Engine(lambda _: "word " * 10_000, pause=0.005, context=1 << 20)

    async def run(completer: RemoteCompleter) -> None:
        async with aclosing(completer.complete(completion(n=2))) as parts:  # type: ignore[type-var]
            async for part in parts:
                if isinstance(part, Continued):
                    assert engine.active == 1 and completer.load().running == 2
                    break
        assert completer.load().running == 0

    with running(engine.app()) as url:
        asyncio.run(run(remote(url)))
        wait_for(lambda: engine.active == 0)


def test_who_leaves_before_the_first_word_too() -> None:
    engine = Engine(lambda _: "word", pause=60)

    async def run(completer: RemoteCompleter) -> None:
        task = asyncio.ensure_future(anext(completer.complete(completion())))
        await asyncio.sleep(0)  # has not even connected
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        parts = completer.complete(completion())
        assert isinstance(await anext(parts), Accepted)
        await parts.aclose()  # type: ignore[attr-defined]

    with running(engine.app()) as url:
        asyncio.run(run(remote(url)))
        wait_for(lambda: engine.active == 0)


def test_an_interruption_ends_what_runs() -> None:
    engine = Engine(lambda _: "word " * 10_000, pause=0.005, context=1 << 20)
    with running(engine.app()) as url:
        completer = remote(url)
        threading.Timer(0.3, completer.interrupt).start()
        parts = collect(completer, completion(n=2))
        assert [part.finish for part in parts if isinstance(part, Continued) and part.finish] == ["interrupted"] * 2
        wait_for(lambda: engine.active == 0)
        completer.interrupt()  # nothing runs
        engine.wait = 60  # it has not even been accepted
        threading.Timer(0.2, completer.interrupt).start()
        parts = collect(completer, completion())
        assert parts == [Accepted(), Continued(0, "", None, "interrupted")]
        engine.wait = 0


def test_many_streams_at_once() -> None:
    engine = Engine(lambda _: "And God saw that it was good", pause=0.01)

    async def run(completer: RemoteCompleter) -> list[str]:
        async def one() -> str:
            return "".join([p.text async for p in completer.complete(completion()) if isinstance(p, Continued)])

        return await asyncio.gather(*(one() for _ in range(256)))

    with running(engine.app()) as url:
        assert asyncio.run(run(remote(url))) == ["And God saw that it was good"] * 256


# the whole of it


def loose(prompt: str) -> str:
    """What V4 says at long context: a call without its wrapper, and a value that is no JSON."""
    thought = "I look it up." + THINK_END if prompt.endswith(THINK_START) else ""
    if "<tool_result>" in prompt:
        return thought + "It is " + prompt.rsplit("<tool_result>", 1)[1].split("</tool_result>")[0] + "."
    return (
        f'{thought}Let me see.\n\n<{DSML}invoke name="get_weather">\n'
        f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">two</{DSML}parameter>\n</{DSML}invoke>'
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_turn_is_repaired_on_its_way(kind: str, tokenizer: Tokenizer | None, stream: bool) -> None:
    engine = Engine(loose, kind, per_chunk=2, cached=4)
    with running(engine.app()) as upstream, serving(remote(upstream, tokenizer)) as url, client(url) as api:
        messages: list[Any] = [{"role": "user", "content": "weather?"}]
        if stream:
            options: Any = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(api.chat.completions.create(model="v4", messages=messages, tools=[WEATHER], **options))
            deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
            thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
            content = "".join(d.content or "" for d in deltas)
            pieces = [call for d in deltas for call in d.tool_calls or ()]
            id_, name = pieces[0].id, pieces[0].function.name
            arguments = "".join(piece.function.arguments or "" for piece in pieces)
            finish, usage = [c.choices[0].finish_reason for c in chunks if c.choices][-1], chunks[-1].usage
        else:
            raw = api.chat.completions.with_raw_response.create(model="v4", messages=messages, tools=[WEATHER])  # type: ignore
            assert "loose_call" in raw.headers["x-abyssal-repaired"]
            message = raw.parse().choices[0].message
            (call,) = message.tool_calls  # type: ignore[misc]
            thought, content = message.reasoning_content, message.content  # type: ignore[attr-defined]
            id_, name, arguments = call.id, call.function.name, call.function.arguments  # type: ignore[union-attr]
            finish, usage = raw.parse().choices[0].finish_reason, raw.parse().usage
        assert (thought, content, name) == ("I look it up.", "Let me see.", "get_weather")
        assert json.loads(arguments) == {"city": "Oslo", "days": "two"} and finish == "tool_calls"
        made = ids_of(loose(text_of(engine.bodies[0]["prompt"])))
        assert usage.prompt_tokens == len(engine.bodies[0]["prompt"]) and usage.prompt_tokens_details.cached_tokens == 4
        assert usage.completion_tokens == len(made) + 1
        function = {"name": name, "arguments": arguments}
        messages += [
            {"role": "assistant", "content": content, "reasoning_content": thought,
             "tool_calls": [{"id": id_, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": id_, "content": "-3 C"},
        ]  # fmt: skip
        whole = api.chat.completions.create(model="v4", messages=messages, tools=[WEATHER])  # type: ignore[arg-type]
        assert whole.choices[0].message.content == "It is -3 C."


def test_errors_of_the_upstream_reach_the_client() -> None:
    engine = Engine(str, refuse=JSONResponse(LONG["vllm"], 400))
    ask: dict[str, Any] = {"model": "v4", "messages": [{"role": "user", "content": "hi"}]}
    with running(engine.app()) as upstream, serving(remote(upstream)) as url, client(url) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(**ask)
        assert caught.value.code == "context_length_exceeded"
        engine.refuse = JSONResponse({"error": {"message": "full"}}, 503)
        with pytest.raises(openai.InternalServerError) as busy:
            api.chat.completions.create(**ask, stream=True)
        assert busy.value.status_code == 503 and busy.value.response.headers["retry-after"]
        engine.refuse, engine.breaks = None, {3: b"data: {broken\n\n"}
        engine.script = lambda _: "one two three four five"
        with pytest.raises(openai.APIError, match="no completion"):
            list(api.chat.completions.create(**ask, stream=True))


def test_a_client_that_leaves_frees_the_upstream() -> None:
    engine = Engine(lambda _: THINK_END + "word " * 10_000, pause=0.005, context=1 << 20)
    with running(engine.app()) as upstream, serving(remote(upstream)) as url, client(url) as api:
        ask: dict[str, Any] = {"model": "v4", "messages": [{"role": "user", "content": "hi"}]}
        stream = api.chat.completions.create(**ask, stream=True)
        # the first chunk, a role, may come before the upstream has begun
        assert any(chunk.choices and chunk.choices[0].delta.content for chunk in stream)
        assert engine.active == 1
        stream.close()
        wait_for(lambda: engine.active == 0)


def test_the_command_needs_no_torch() -> None:
    """`abyssal serve --upstream` in a process where importing torch fails."""
    script = "import sys; sys.modules['torch'] = None; from abyssal.cli.main import main; main()"
    engine = Engine(lambda _: THINK_END + "Yes")
    with running(engine.app()) as upstream:
        command = [sys.executable, "-c", script, "serve", "--upstream", upstream, "--port", "0"]
        command += ["--tokenizer", str(bundled_folder())]
        environment = {**os.environ, "ABYSSAL_UPSTREAM_KEY": "secret"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        with process:
            assert process.stdout is not None and process.stderr is not None
            try:
                url = process.stdout.readline().removeprefix("listening on ").strip()
                assert url, process.stderr.read()
                ask: Any = [{"role": "user", "content": "hi"}]
                with client(url) as api:
                    found = api.chat.completions.create(model="v4", messages=ask)
                assert found.choices[0].message.content == "Yes" and engine.authorizations == ["Bearer secret"]
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(20)
    # the engine is gone
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and f"{upstream} cannot be reached" in again.stderr


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCompleter]:
    completer = open_local("nano", "april", disk_cache=False)
    yield completer
    completer.close()


def test_the_bundled_model_says_the_same_behind_the_gateway(local: LocalCompleter) -> None:
    """Our own server is the engine: equal seeds give equal answers, tokens and counts, with and without it."""
    ask: dict[str, Any] = {
        "model": "nano", "messages": [{"role": "user", "content": "And the king said unto the people. " * 20}],
        "max_tokens": 40, "temperature": 0.8, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    with (
        serving(local) as direct, serving(remote(direct)) as gateway,
        client(direct) as one_api, client(gateway) as other_api,
    ):  # fmt: skip
        for seed in range(3):
            for thinking in ("enabled", "disabled"):
                extra = {"thinking": {"type": thinking}}
                one, other = (
                    api.chat.completions.create(**ask, seed=seed, extra_body=extra) for api in (one_api, other_api)
                )
                assert one.choices[0].message == other.choices[0].message
                assert one.choices[0].finish_reason == other.choices[0].finish_reason
                assert one.choices[0].logprobs == other.choices[0].logprobs
                assert one.usage.completion_tokens == other.usage.completion_tokens
                assert one.usage.prompt_tokens == other.usage.prompt_tokens
        cached = other.usage.prompt_tokens_details
        assert cached is not None and (cached.cached_tokens or 0) >= 128
        streamed = other_api.chat.completions.create(**ask, seed=2, stream=True, extra_body=extra)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert text == other.choices[0].message.content
        body = {"model": "nano", "prompt": "In the beginning", "max_tokens": 10, "seed": 3, "echo": True, "logprobs": 1}
        texts = [httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json() for url in (direct, gateway)]
        assert texts[0]["choices"] == texts[1]["choices"] and texts[0]["usage"] == texts[1]["usage"]


def test_a_forced_call_of_the_bundled_model(local: LocalCompleter) -> None:
    """It has not learned to call, but where it begins to, the beginning is right and nothing is invented."""
    with serving(local) as direct:
        found = events(remote(direct), question(tool_mode="required", max_tokens=60, max_reasoning=10))
    assert isinstance(found[0], Accepted) and isinstance(found[-1], Usage)
    assert next(e.reason for e in found if isinstance(e, Finished)) in ("length", "stop", "tool_calls")
    assert 10 <= found[-1].completion <= 60
