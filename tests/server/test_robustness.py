"""The server among clients that are broken, slow, greedy or gone: every route, each in its vendor's shape.

Whatever a client does, it gets an answer or a refusal that says why, nobody waits without end, and afterwards nothing
is left over: no request that still computes, no place taken, no task, no open file.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anthropic
import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from abyssal.base.errors import InputError
from abyssal.chat.api import Accepted, Completer, Completion, Continued, PromptUse, Sampling
from abyssal.chat.local import LocalCompleter
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.tokenizer import Piece, Tokenizer
from abyssal.engine.engine import Engine
from abyssal.server.app import Server
from abyssal.server.openapi import plain
from abyssal.server.run import _Uvicorn
from abyssal.server.settings import Settings, keys
from tests.server.serving import Scripted

WAIT_S = 60.0  # for what must come; long, since other tests may keep the machine busy
QUESTION: list[Any] = [{"role": "user", "content": "hi"}]
# a request to each API; answers run without thinking unless a test asks for it
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": QUESTION, "thinking": {"type": "disabled"}},
    "/v1/completions": {"prompt": "hi", "max_tokens": 100_000},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 100_000, "thinking": {"type": "disabled"}},
    "/v1/responses": {"input": "hi", "reasoning": {"effort": "none"}},
}
CHAT = "/v1/chat/completions"
every_api = pytest.mark.parametrize("path", ASKS)


def ask(path: str, **more: Any) -> bytes:
    """A request's body; what is None is left out."""
    body = {"model": "nano", **ASKS[path], **more}
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    server: Server
    uvicorn: _Uvicorn

    def tasks(self) -> int:
        """Tasks of its loop."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        loop = self.uvicorn.servers[0].get_loop()
        return asyncio.run_coroutine_threadsafe(count(), loop).result(WAIT_S)

    def end(self) -> None:
        """Ask it to end, as a signal does."""
        self.uvicorn.should_exit = True


@contextmanager
def running(completer: Completer, settings: Settings | None = None) -> Iterator[Running]:
    server = Server(completer, settings)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    uvicorn = _Uvicorn(server)
    thread = threading.Thread(target=uvicorn.run, args=([listening],), daemon=True)
    thread.start()
    eventually(lambda: uvicorn.started)
    try:
        yield Running(f"http://127.0.0.1:{port}", server, uvicorn)
    finally:
        uvicorn.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def open_client() -> httpx2.Client:
    # without the certificates, which nobody needs here and which take longer to read than most of these tests
    return httpx2.Client(timeout=WAIT_S, trust_env=False, verify=False)


def send(url: str, body: bytes | None = None, method: str | None = None, **headers: str) -> httpx2.Response:
    """One request on a connection of its own."""
    with open_client() as client:
        kind = {"content-type": "application/json"} if body is not None else {}
        return client.request(method or ("GET" if body is None else "POST"), url, content=body,
                              headers={**kind, "connection": "close", **headers})  # fmt: skip


@contextmanager
def wire(url: str, data: bytes, *, buffer: int | None = None) -> Iterator[socket.socket]:
    """A bare connection on which something was sent."""
    parts = urlsplit(url)
    with socket.socket() as bare:
        if buffer is not None:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        bare.settimeout(WAIT_S)
        bare.connect((parts.hostname, parts.port))
        bare.sendall(data)
        yield bare


def head(path: str, length: int | None, **headers: str) -> bytes:
    """The head of a POST."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n{size}\r\n{more}\r\n".encode()


def whole_answer(bare: socket.socket) -> tuple[int, bytes]:
    """Status and the rest of everything until the server closes."""
    parts = []
    while part := bare.recv(1 << 16):
        parts.append(part)
    answer = b"".join(parts)
    return int(answer.split(b" ", 2)[1]), answer.split(b"\r\n\r\n", 1)[1]


def refusal(path: str, answer: httpx2.Response | bytes) -> dict[str, Any]:
    """The error of an answer, which must have its vendor's shape."""
    body = json.loads(answer if isinstance(answer, bytes) else answer.content)
    if "/messages" in path:
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "Traceback" not in body["error"]["message"]
    return body["error"]


def events(raw: str) -> list[dict[str, Any]]:
    """Data of a stream's events."""
    data = [line[6:] for line in raw.split("\n") if line.startswith("data: ")]
    return [json.loads(one) if one != "[DONE]" else {"type": "done"} for one in data]


def said(path: str, answer: httpx2.Response) -> str:
    """The text of a whole answer or a stream, which must have ended as it should."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        body = answer.json()
        if path == CHAT:
            return body["choices"][0]["message"]["content"]
        if path == "/v1/completions":
            return body["choices"][0]["text"]
        parts = body["content"] if path == "/v1/messages" else body["output"][-1]["content"]
        return parts[-1]["text"]
    told = events(answer.text)
    assert told[-1]["type"] == {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}.get(path, "done")
    if path == CHAT:
        return "".join(choice["delta"].get("content", "") for one in told[:-1] for choice in one["choices"])
    if path == "/v1/completions":
        return "".join(choice["text"] for one in told[:-1] for choice in one["choices"])
    if path == "/v1/messages":
        return "".join(one["delta"].get("text", "") for one in told if one["type"] == "content_block_delta")
    return "".join(one["delta"] for one in told if one["type"] == "response.output_text.delta")


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """A server that says what it was asked, and thinks nothing."""
    with running(Scripted(lambda prompt: prompt)) as server:
        yield server.url


# bodies


MALFORMED = {
    "nothing": b"",
    "cut": b'{"model": "nano", "messages": [',
    "no object": b"[1]",
    "a number": b"3",
    "two values": b"{}{}",
    "no UTF-8": b'{"model": "nano\xff"}',
    "a surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "UTF-16": '{"model": "nano"}'.encode("utf-16"),
    "NaN": b'{"model": "nano", "temperature": NaN}',
    "infinity": b'{"model": "nano", "temperature": -Infinity}',
    "single quotes": b"{'model': 'nano'}",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "NUL": b"\0",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
@every_api
def test_what_is_no_json_object_is_refused(echo: str, path: str, body: bytes) -> None:
    answer = send(echo + path, body)
    assert answer.status_code == 400
    assert refusal(path, answer)["type"] == "invalid_request_error"


WRONG: list[Any] = [
    None, True, -1, 0, 1, 1.5, -1e300, 1e308, 10**30, "", "x", "\ud800", "\0", "9" * 5000,
    [], [None], [[]], ["x"], [-1], [10**30], {}, {"type": "x"}, {"type": None}, {"9" * 400: 1}, {"1": 1e999},
    {"type": "json_schema", "json_schema": {"schema": {"type": 7}}},
    {"format": {"type": "json_schema", "schema": {"$ref": "#/nowhere"}}},
    [{"role": "user"}], [{"role": "user", "content": {"x": 1}}], [{"role": "tool", "content": "x", "tool_call_id": []}],
    [{"type": "function", "function": {"name": None}}], [{"name": {}}], [{"type": "function_call_output", "output": 3}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": 1, "function": {"name": 2, "arguments": 3}}]}],
]  # fmt: skip


@every_api
def test_no_value_of_any_field_is_a_bug(echo: str, path: str) -> None:
    """Each known field with each of these: answered or refused, in the vendor's shape, and never a 500."""
    with running(Scripted(lambda _: "yes")) as server, open_client() as client:
        body = next(operation.body for operation in server.server.operations() if path in operation.paths)
        assert body is not None
        for name in body.model_fields:
            for value in WRONG:
                sent = json.dumps({"model": "nano", **ASKS[path], name: value}).replace("Infinity", "1e999")
                answer = client.post(server.url + path, content=sent)
                if answer.status_code != 200:
                    assert answer.status_code in (400, 404, 422), (name, value, answer.text)
                    refusal(path, answer)


@pytest.mark.parametrize("depth", [50, 400, 900, 5000])
@every_api
def test_nesting_is_answered_or_refused(echo: str, path: str, depth: int) -> None:
    nested: Any = {}
    for _ in range(50):
        nested = {"properties": {"a": nested}, "items": [nested]} if not nested else {"properties": {"a": nested}}
    deep = json.dumps(nested).replace("{}", '{"a":' * depth + "1" + "}" * depth)
    function = '"name": "f", "parameters": ' + deep
    tools = {
        "/v1/messages": '[{"name": "f", "input_schema": ' + deep + "}]",
        "/v1/responses": '[{"type": "function", ' + function + "}]",
    }.get(path, '[{"type": "function", "function": {' + function + "}}]")
    form = '{"type": "json_schema", "json_schema": {"name": "x", "schema": ' + deep + '}, "schema": ' + deep + "}"
    parts = {"unknown": deep, "tools": tools, "messages": deep, "input": f"[{deep}]", "metadata": deep,
             "response_format": form, "text": '{"format": ' + form + "}", "output_config": '{"format": ' + form + "}"}
    for name, value in parts.items():
        sent = ask(path, **{name: "HERE"}).replace(b'"HERE"', value.encode())
        answer = send(echo + path, sent)
        assert answer.status_code in (200, 400, 422), answer.text
        if answer.status_code != 200:
            refusal(path, answer)


def test_the_last_of_equal_keys_counts(echo: str) -> None:
    body = ask(CHAT).replace(b"{", b'{"model": "gpt-5", "messages": [], ', 1)
    assert "hi" in said(CHAT, send(echo + CHAT, body))


@pytest.mark.parametrize("stream", [False, True])
@every_api
def test_texts_that_are_hard_to_write_come_back(echo: str, path: str, stream: bool) -> None:
    """Halves of surrogate pairs are replaced as browsers do; everything else comes back as it was sent."""
    hard = "whole 😀 NUL \0 end \u2028 bell \x07 del \x7f bom \ufeff plane \U0010ffff right \u202e"
    field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    sent: Any = f"{hard} half \ud83d, other \ude00."
    body = ask(path, stream=stream, **{field: [{"role": "user", "content": sent}] if field == "messages" else sent})
    assert f"{hard} half \ufffd, other \ufffd." in said(path, send(echo + path, body))


def test_a_half_pair_is_no_trouble_anywhere(echo: str) -> None:
    half = "\ud800"
    tool = {"type": "function", "function": {"name": half, "description": half, "parameters": {half: half}}}
    call = {"id": half, "type": "function", "function": {"name": half, "arguments": json.dumps({half: half})}}
    messages = [*QUESTION, {"role": "assistant", "content": half, "reasoning_content": half, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": half, "content": half}]  # fmt: skip
    for more in ({"tools": [tool], "messages": messages}, {"stop": [half]}, {"user": half, half: half}):
        assert send(echo + CHAT, ask(CHAT, **more)).status_code == 200
    assert send(echo + CHAT, ask(CHAT, model=half)).status_code == 404
    assert send(echo + "/tokenize", json.dumps({"prompt": half}).encode()).json()["tokens"][-1] == 0xFFFD


# size and speed


@every_api
def test_a_body_that_says_it_is_too_large_is_not_read(path: str) -> None:
    with running(Scripted(lambda _: ""), Settings(body_bytes=1000)) as server:
        with wire(server.url, head(path, 1001, Connection="close")) as bare:  # none of the body is ever sent
            status, body = whole_answer(bare)
        assert status == 413 and "1000 bytes" in refusal(path, body)["message"]
        exact = ask(path)
        answer = send(server.url + path, exact + b" " * (1000 - len(exact)))
        assert answer.status_code == 200


@every_api
def test_chunks_beyond_the_limit_are_refused(path: str) -> None:
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    with running(Scripted(lambda _: ""), Settings(body_bytes=10_000)) as server:
        with wire(server.url, head(path, None, Connection="close") + chunk * 3 + b"0\r\n\r\n") as bare:
            status, body = whole_answer(bare)
        assert status == 413
        refusal(path, body)


@every_api
def test_a_body_that_does_not_come_is_not_waited_for(path: str) -> None:
    scripted = Scripted(lambda _: "yes")
    with running(scripted, Settings(body_s=0.2)) as server:
        with wire(server.url, head(path, 500) + b'{"model": ') as bare:
            status, body = whole_answer(bare)  # the server closes: a slow client does not keep the connection
        assert status == 408
        refusal(path, body)
        assert said(path, send(server.url + path, ask(path))) == "yes"
    assert len(scripted.prompts) == 1


class Chunky(Scripted):
    """Says large pieces as fast as they are taken, and counts them."""

    pieces = 120
    made = 0

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        self.active += 1
        try:
            yield Accepted()
            yield PromptUse(1, 0)
            for number in range(self.pieces):
                await asyncio.sleep(0)
                self.made += 1
                yield Continued(0, f"{number:05}" + "x" * 65_531, None)
            yield Continued(0, "", None, "stop")
        finally:
            self.active -= 1


@every_api
def test_a_slow_reader_holds_up_the_model_and_nobody_else(path: str) -> None:
    chunky = Chunky(lambda _: "")
    with running(chunky) as server:
        body = ask(path, stream=True)
        with wire(server.url, head(path, len(body), Connection="close") + body, buffer=1 << 18) as bare:
            eventually(lambda: chunky.made)
            before = -1
            while chunky.made != before:  # until what lies between is full
                before = chunky.made
                time.sleep(0.2)
            assert 0 < chunky.made < Chunky.pieces
            assert send(f"{server.url}/health").json()["running"] == 1
            assert send(server.url + "/tokenize", b'{"prompt": "x"}').status_code == 200
            status, answer = whole_answer(bare)
        assert status == 200 and chunky.made == Chunky.pieces
        # Responses says all of it again in the end
        assert list(dict.fromkeys(re.findall(rb"(\d{5})x", answer))) == [b"%05d" % n for n in range(Chunky.pieces)]
        eventually(lambda: chunky.active == 0 and server.server.service.limits.running == 0)


@every_api
def test_a_slow_reader_that_leaves_frees_its_place(path: str) -> None:
    chunky = Chunky(lambda _: "")
    with running(chunky) as server:
        body = ask(path, stream=True)
        with wire(server.url, head(path, len(body)) + body, buffer=1 << 18):
            eventually(lambda: chunky.active == 1)
            time.sleep(0.2)
        eventually(lambda: chunky.active == 0 and server.server.service.limits.running == 0)


# many


def test_two_hundred_at_once_are_answered_or_told_to_come_back() -> None:
    def script(prompt: str) -> str:
        return f"for {re.findall('ask ([0-9]+)', prompt)[-1]}: " + "so it is. " * 3

    scripted = Scripted(script, pause=0.002)
    paths = list(ASKS)

    async def one(client: httpx2.AsyncClient, number: int) -> int:
        path, stream = paths[number % 4], number % 8 < 4
        text = f"ask {number}"
        field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
        content: Any = [{"role": "user", "content": text}] if field == "messages" else text
        refused = 0
        while True:
            answer = await client.post(path, content=ask(path, stream=stream, **{field: content}))
            if answer.status_code != 429:
                assert said(path, answer) == script(text)
                return refused
            refusal(path, answer)
            assert int(answer.headers["retry-after"]) > 0
            refused += 1
            await asyncio.sleep(0.05)

    async def all_of_them(url: str) -> list[int]:
        many = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=WAIT_S, limits=many, verify=False) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    with running(scripted, Settings(requests=50)) as server:
        refused = asyncio.run(all_of_them(server.url))
        assert len(refused) == 200 and sum(refused) > 0
        eventually(lambda: server.server.service.limits.running == 0 and scripted.active == 0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
@pytest.mark.parametrize("keep_alive_s", [10.0, 0.02])
def test_nothing_is_left_of_clients_that_leave(keep_alive_s: float) -> None:
    """They leave at every moment: in the head, in the body, before the first token, amid the answer."""
    chance = random.Random(0)
    scripted = Scripted(lambda _: "x" * 100_000, pause=0.005)
    with running(scripted, Settings(keep_alive_s=keep_alive_s, traces=0)) as server:
        limits = server.server.service.limits

        def leave(path: str, moment: str) -> None:
            body = ask(path, stream=chance.random() < 0.6)
            request = head(path, len(body)) + body
            cut = {"head": chance.randrange(1, 80), "body": len(request) - chance.randrange(1, 50)}.get(moment)
            with wire(server.url, request[:cut]) as bare:
                if moment == "soon":
                    time.sleep(chance.random() * 0.02)
                elif moment == "later":
                    time.sleep(0.03 + chance.random() * 0.1)
                if chance.random() < 0.5:  # with a reset instead of an end
                    bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        def idle() -> bool:
            return scripted.active == 0 and limits.running == 0 and server.tasks() <= tasks and open_files() <= files

        tasks, files = server.tasks(), open_files()
        for _ in range(3):
            leave(CHAT, "later")
        eventually(idle)
        threads = []
        for number in range(120):
            path = list(ASKS)[number % 4]
            moment = ("head", "body", "at once", "soon", "later")[number % 5]
            threads.append(threading.Thread(target=leave, args=(path, moment)))
            threads[-1].start()
            time.sleep(chance.random() * 0.01)
        for thread in threads:
            thread.join(WAIT_S)
        eventually(idle)
        assert len(scripted.prompts) >= 48  # many did get as far as the model


# waiting


def test_streams_say_that_they_are_alive() -> None:
    with running(Scripted(lambda _: "ab", pause=0.2), Settings(keep_alive_s=0.03)) as server:
        for path in ASKS:
            answer = send(server.url + path, ask(path, stream=True))
            assert said(path, answer) == "ab"
            filler = 'event: ping\ndata: {"type":"ping"}\n\n' if path == "/v1/messages" else ": keep-alive\n\n"
            assert answer.text.count(filler) >= 3
            for block in answer.text.split("\n\n"):  # whole events, none cut by a filler
                assert re.fullmatch(r"(event: \S+\n)?data: .*|: keep-alive|", block)


def test_slow_answers_begin_with_empty_lines() -> None:
    with running(Scripted(lambda _: "ab", pause=0.1), Settings(keep_alive_s=0.03)) as server:
        for path in ASKS:
            answer = send(server.url + path, ask(path))
            assert answer.content.startswith(b"\n\n") and said(path, answer) == "ab"


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_clients_read_slow_answers(stream: bool) -> None:
    with running(Scripted(lambda _: "ab", pause=0.1), Settings(keep_alive_s=0.03)) as server:
        one = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        two = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        off: Any = {"type": "disabled"}
        if stream:
            chunks = one.chat.completions.create(
                model="nano", messages=QUESTION, extra_body={"thinking": off}, stream=True
            )
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"
            with two.messages.stream(model="nano", messages=QUESTION, max_tokens=99, thinking=off) as told:
                assert told.get_final_text() == "ab"
        else:
            answer = one.chat.completions.create(model="nano", messages=QUESTION, extra_body={"thinking": off})
            assert answer.choices[0].message.content == "ab"
            message = two.messages.create(model="nano", messages=QUESTION, max_tokens=99, thinking=off)
            assert message.content[0].type == "text" and message.content[0].text == "ab"


class Broken(Scripted):
    """Fails at its third token, in a way that nobody foresaw."""

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        left = 2
        async for part in super().complete(completion):
            if isinstance(part, Continued):
                left -= 1
                if left < 0:
                    raise ZeroDivisionError("secret")
            yield part


@pytest.mark.parametrize("keep_alive_s", [10.0, 0.01])
def test_a_bug_is_told_without_its_secrets(keep_alive_s: float, caplog: pytest.LogCaptureFixture) -> None:
    with running(Broken(lambda _: "abcdef", pause=0.02), Settings(keep_alive_s=keep_alive_s)) as server:
        for path, stream in itertools.product(ASKS, (False, True)):
            answer = send(server.url + path, ask(path, stream=stream))
            assert "secret" not in answer.text and "ZeroDivision" not in answer.text
            late = stream or keep_alive_s < 1  # the status was out before
            assert answer.status_code == (200 if late else 500)
            error = refusal(path, json.dumps(events(answer.text)[-1]).encode() if stream else answer)
            number = re.findall("err_[0-9a-f]{16}", error["message"])[0]
            assert any(getattr(record, "error", None) == number and record.exc_info for record in caplog.records)
            assert server.server.service.limits.running == 0
            assert send(server.url + "/health").status_code == 200


# limits


def retry(answer: httpx2.Response) -> int:
    return int(answer.headers["retry-after"])


def test_requests_of_one_key_are_limited_apart_from_others() -> None:
    scripted = Scripted(lambda _: "x" * 100_000, pause=0.01)
    settings = Settings(api_keys=keys(["one", "two"]), requests_per_key=1)
    first = {"x-api-key": "one"}
    with running(scripted, settings) as server, open_client() as client:
        for path in ASKS:
            with client.stream("POST", server.url + path, content=ask(path, stream=True), headers=first) as stream:
                rest = stream.iter_raw()
                next(rest)
                for other in ASKS:
                    answer = send(server.url + other, ask(other), **first)
                    assert answer.status_code == 429 and retry(answer) > 0
                    assert refusal(other, answer)["type"] == "rate_limit_error"
                scripted.script = lambda _: "yes"
                assert said(path, send(server.url + path, ask(path), authorization="Bearer two")) == "yes"
                scripted.script = lambda _: "x" * 100_000
                next(rest)
            eventually(lambda: scripted.active == 0)
            scripted.script = lambda _: "yes"
            assert said(path, send(server.url + path, ask(path), **first)) == "yes"
            scripted.script = lambda _: "x" * 100_000


@every_api
def test_a_key_uses_up_its_tokens(path: str) -> None:
    settings = Settings(api_keys=keys(["one", "two"]), tokens_per_key=60)
    with running(Scripted(lambda _: "x" * 50), settings) as server:
        assert send(server.url + path, ask(path), **{"x-api-key": "one"}).status_code == 200
        answer = send(server.url + path, ask(path), **{"x-api-key": "one"})
        assert answer.status_code == 402 and "60 tokens" in refusal(path, answer)["message"]
        kind = "billing_error" if path == "/v1/messages" else "insufficient_balance"
        assert refusal(path, answer)["type"] == kind
        assert send(server.url + path, ask(path), **{"x-api-key": "two"}).status_code == 200


@every_api
def test_leaving_before_the_end_does_not_save_tokens(path: str) -> None:
    scripted = Scripted(lambda _: "ø" * 100_000, pause=0.001)
    with running(scripted, Settings(tokens_per_key=100)) as server:
        body = ask(path, stream=True)
        with wire(server.url, head(path, len(body)) + body) as bare:
            got = b""
            while got.count("ø".encode()) < 100:
                got += bare.recv(1 << 16)
        eventually(lambda: scripted.active == 0)
        scripted.script = lambda _: ""
        assert send(server.url + path, ask(path)).status_code == 402


def test_keys_are_asked_for() -> None:
    wrong: list[dict[str, str]] = [
        {}, {"authorization": "Bearer"}, {"authorization": "Bearer two"}, {"authorization": "Basic one"},
        {"x-api-key": "ONE"}, {"x-api-key": ""}, {"authorization": "one"},
    ]  # fmt: skip
    with running(Scripted(lambda _: "yes"), Settings(api_keys=keys(["one", "two words"]))) as server:
        for path in ASKS:
            for headers in wrong:
                answer = send(server.url + path, ask(path), **headers)
                assert answer.status_code == 401
                assert refusal(path, answer)["type"] == "authentication_error"
            body = ask(path)
            strange = head(path, len(body), Connection="close", Authorization="Bearer \xff")
            with wire(server.url, strange + body) as bare:
                assert whole_answer(bare)[0] == 401
            for headers in ({"authorization": "bearer one"}, {"x-api-key": "one"}, {"x-api-key": "two words"}):
                assert said(path, send(server.url + path, ask(path), **headers)) == "yes"
        for open_to_all in ("/health", "/ready", "/docs", "/openapi.json", "/"):
            assert send(server.url + open_to_all).status_code == 200
        assert send(f"{server.url}/metrics").status_code == 401


# the end


@every_api
def test_while_it_ends_no_more_requests_are_taken(path: str) -> None:
    scripted = Scripted(lambda _: "x" * 40, pause=0.02)
    with running(scripted) as server, open_client() as client:
        assert send(f"{server.url}/ready").status_code == 200
        body = ask(path)
        with (
            wire(server.url, head(path, len(body)) + body[:10]) as late,  # its body is not here yet
            client.stream("POST", server.url + path, content=ask(path, stream=True)) as stream,
        ):
            eventually(lambda: scripted.active == 1)
            server.end()
            eventually(lambda: server.server.service.limits.draining)
            late.sendall(body[10:])
            status, answer = whole_answer(late)
            assert status == 503 and "shutting down" in refusal(path, answer)["message"]
            stream.read()
            assert said(path, stream) == "x" * 40  # what ran, ran to its end


def test_a_draining_server_says_so() -> None:
    with running(Scripted(lambda _: "yes")) as server:
        server.server.service.limits.draining = True
        ready = send(f"{server.url}/ready")
        assert ready.status_code == 503 and ready.json() == {"ready": False}
        for path in ASKS:
            answer = send(server.url + path, ask(path))
            assert answer.status_code == 503 and retry(answer) > 0
            kind = "overloaded_error" if path == "/v1/messages" else "server_error"
            assert refusal(path, answer)["type"] == kind
        assert send(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@every_api
def test_what_does_not_end_in_time_is_handed_back(path: str, stream: bool) -> None:
    scripted = Scripted(lambda _: "x" * 100_000, pause=0.02)
    with running(scripted, Settings(grace_s=0.3)) as server, open_client() as client:
        threading.Timer(0.2, server.end).start()
        answer = client.post(server.url + path, content=ask(path, stream=stream))
        told = events(answer.text) if stream else [answer.json()]
        if path in (CHAT, "/v1/completions"):
            assert answer.status_code == 200
            if stream:
                assert told.pop()["type"] == "done"
            assert told[-1]["choices"][0]["finish_reason"] == "insufficient_system_resource"
        elif stream:
            assert told[-1]["type"] == {"/v1/messages": "error", "/v1/responses": "response.failed"}[path]
        else:
            assert answer.status_code == 503 and retry(answer) > 0
            refusal(path, answer)


def test_sigterm_ends_a_real_server_in_good_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from abyssal.cli.main import main; main()", "serve", "--port", "0",
               "--no-disk-cache", "--grace", "0.5"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("listening on ").strip()
            assert url.startswith("http://127.0.0.1:")
            # the end token is forbidden, so the answer would go on
            body = ask(CHAT, stream=True, logit_bias={"1": -100}, max_tokens=100_000)
            with wire(url, head(CHAT, len(body)) + body) as bare:
                raw = b""
                while part := bare.recv(1 << 16):
                    if raw.count(b"data:") < 4 <= (raw + part).count(b"data:"):
                        process.send_signal(signal.SIGTERM)
                    raw += part
            assert b"200 OK" in raw[:20] and raw.endswith(b"\r\n0\r\n\r\n")
            told = events(re.sub(rb"\r\n[0-9a-f]+\r\n", b"", raw).decode())
            assert told[-1]["type"] == "done"
            assert told[-2]["choices"][0]["finish_reason"] == "insufficient_system_resource"
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        log.seek(0)
        text = log.read()
        assert "Traceback" not in text and '"event": "ending"' in text


# what operators see


def counters(url: str, **headers: str) -> dict[tuple[str, ...], float]:
    """Values by name and by all labels but the model's."""
    answer = send(f"{url}/metrics", **headers)
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[sample.name.removeprefix("abyssal:"), *labels] = sample.value
    return found


def test_metrics_of_experts_are_there_where_some_are_on_disk() -> None:
    scripted = Scripted(lambda prompt: "yes")
    names = ("expert_hits_total",), ("expert_misses_total",), ("expert_read_bytes_total",)
    with running(scripted) as server:
        assert not counters(server.url).keys() & set(names)
        scripted.experts = 7
        assert [counters(server.url)[name] for name in names] == [7, 7, 7]


def test_metrics_count_what_was_sent() -> None:
    scripted = Scripted(lambda prompt: "</think>yes" if prompt.endswith("<think>") else "yes")
    with running(scripted) as server:
        before = counters(server.url)
        assert before["prompt_tokens_total",] == 0 and before["num_requests_running",] == 0
        prompt = cached = made = reasoning = 0
        for _ in range(3):
            usage = send(server.url + CHAT, ask(CHAT, thinking=None)).json()["usage"]
            prompt += usage["prompt_tokens"]
            cached += usage["prompt_cache_hit_tokens"]
            made += usage["completion_tokens"]
            reasoning += usage["completion_tokens_details"]["reasoning_tokens"]
        usage = send(server.url + "/v1/completions", ask("/v1/completions", max_tokens=2)).json()["usage"]
        prompt, cached, made = prompt + usage["prompt_tokens"], cached + usage["prompt_cache_hit_tokens"], made + 2
        usage = send(server.url + "/v1/messages", ask("/v1/messages")).json()["usage"]
        prompt += usage["input_tokens"] + usage["cache_read_input_tokens"]
        cached += usage["cache_read_input_tokens"]
        made += usage["output_tokens"]
        usage = send(server.url + "/v1/responses", ask("/v1/responses", stream=True)).text
        usage = events(usage)[-1]["response"]["usage"]
        prompt, made = prompt + usage["input_tokens"], made + usage["output_tokens"]
        cached += usage["input_tokens_details"]["cached_tokens"]
        for _ in range(2):
            send(server.url + CHAT, ask(CHAT, model="gpt-5"))
        for name in ("gpt-5", "gpt-6", "nano"):
            send(f"{server.url}/v1/models/{name}")
        send(f"{server.url}/no/such/route")
        found = counters(server.url)
        assert found["prompt_tokens_total",] == found["prefix_cache_queries_total",] == prompt
        assert found["prefix_cache_hits_total",] == cached
        assert found["generation_tokens_total",] == made
        assert found["reasoning_tokens_total",] == reasoning > 0
        assert found["request_success_total", "stop"] == 5 and found["request_success_total", "length"] == 1
        assert found["http_requests_total", CHAT, "200"] == 3 and found["http_requests_total", CHAT, "404"] == 2
        # one counter for all that clients can fill in
        assert found["http_requests_total", "/v1/models/{name}", "404"] == 2
        assert found["http_requests_total", "none", "404"] == 1
        assert found["e2e_request_latency_seconds_count",] == found["time_to_first_token_seconds_count",] == 6
        assert found["inter_token_latency_seconds_count",] > 0
        slow = Scripted(lambda _: "x" * 1000, pause=0.02)
        with running(slow) as other:
            body = ask(CHAT, stream=True)
            with wire(other.url, head(CHAT, len(body)) + body) as bare:
                assert bare.recv(1 << 10)
                assert counters(other.url)["num_requests_running",] == 1


def test_two_servers_in_one_process_share_nothing() -> None:
    one, two = Scripted(lambda _: "one"), Scripted(lambda _: "two")
    two.model = "other"
    with running(one, Settings(api_keys=keys(["k"]))) as first, running(two) as second:
        key = {"x-api-key": "k"}
        assert said(CHAT, send(first.url + CHAT, ask(CHAT), **key)) == "one"
        assert said(CHAT, send(second.url + CHAT, ask(CHAT, model="other"))) == "two"
        assert send(first.url + CHAT, ask(CHAT)).status_code == 401
        assert send(second.url + CHAT, ask(CHAT)).status_code == 404  # nano is the first one's name
        for url, headers in ((first.url, key), (second.url, {})):
            assert counters(url, **headers)["request_success_total", "stop"] == 1
            assert len(send(f"{url}/traces", **headers).json()["traces"]) == 1
        assert len(one.prompts) == len(two.prompts) == 1


def test_a_key_sees_its_own_traces_and_responses_alone() -> None:
    with running(Scripted(lambda _: "yes"), Settings(api_keys=keys(["one", "two"]), traces=3)) as server:
        ids: dict[str, list[str]] = {"one": [], "two": []}
        for key in ("one", "two", "two"):
            ids[key].append(send(server.url + CHAT, ask(CHAT), **{"x-api-key": key}).headers["x-request-id"])
        for key, other in (("one", "two"), ("two", "one")):
            mine = {"x-api-key": key}
            listed = send(f"{server.url}/traces", **mine).json()["traces"]
            assert [trace["id"] for trace in listed] == ids[key][::-1]
            assert send(f"{server.url}/traces/{ids[key][0]}", **mine).json()["finish_reason"] == "stop"
            answer = send(f"{server.url}/traces/{ids[other][0]}", **mine)
            assert answer.status_code == 404
            refusal(CHAT, answer)
        assert send(f"{server.url}/traces").status_code == 401
        path = "/v1/responses"
        first = send(server.url + path, ask(path), **{"x-api-key": "one"}).json()["id"]
        again = ask(path, previous_response_id=first)
        assert send(server.url + path, again, **{"x-api-key": "one"}).status_code == 200
        assert send(server.url + path, again, **{"x-api-key": "two"}).status_code == 400


# names, methods, browsers


def test_answers_say_which_model_answered() -> None:
    with running(Scripted(lambda _: "yes")) as server:
        for path in ASKS:
            for name in ("nano", "deepseek-v4-pro", "claude-sonnet-5"):
                answer = send(server.url + path, ask(path, model=name))
                assert said(path, answer) == "yes" and answer.headers["x-abyssal-model"] == "nano"
                assert answer.headers["x-request-id"].startswith("req_") and "deprecation" not in answer.headers
            for stream in (False, True):
                answer = send(server.url + path, ask(path, model="deepseek-chat", stream=stream))
                assert answer.headers["deprecation"] == "true" and answer.headers["x-abyssal-model"] == "nano"
            answer = send(server.url + path, ask(path, model="gpt-5"))
            assert answer.status_code == 404 and "gpt-5" in refusal(path, answer)["message"]
            assert refusal(path, answer)["type"] == "not_found_error"
    with running(Scripted(lambda _: "yes"), Settings(legacy_names=False)) as server:
        for path in ASKS:
            answer = send(server.url + path, ask(path, model="deepseek-reasoner"))
            assert answer.status_code == 400 and "2026-07-24" in refusal(path, answer)["message"]


def test_other_methods_are_refused_on_every_route() -> None:
    with running(Scripted(lambda _: "yes")) as server, open_client() as client:
        for operation in server.server.operations():
            allowed = {"GET", "HEAD"} if operation.method == "GET" else {"POST"}
            for path in operation.paths:
                where = plain(path).replace("{name}", "nano").replace("{id}", "x")
                for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} - allowed:
                    answer = client.request(method, server.url + where)
                    assert answer.status_code == 405, (method, where)
                    assert set(answer.headers["allow"].split(", ")) == allowed
                    if method != "HEAD":
                        assert method in refusal(where, answer)["message"]
        answer = client.head(f"{server.url}/health")
        assert answer.status_code == 200 and not answer.content
        for path in ("/v1/nothing", "/v1/messages/nothing", "/../etc/passwd", "/web/../app.py", "/web/%2e%2e%2fapp.py"):
            answer = client.get(server.url + path)
            assert answer.status_code == 404
            refusal(path, answer)


def test_browsers_of_other_origins_may_not_call_unless_listed() -> None:
    origin = "https://page.example"
    asking = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    with running(Scripted(lambda _: "yes")) as server:
        assert send(server.url + CHAT, method="OPTIONS", **asking).status_code == 405
        answer = send(server.url + CHAT, ask(CHAT), origin=origin)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    with running(Scripted(lambda _: "yes"), Settings(cors=(origin,), api_keys=keys(["k"]))) as server:
        answer = send(server.url + CHAT, method="OPTIONS", **asking)  # a browser sends no key with this one
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        assert "x-api-key" in answer.headers["access-control-allow-headers"]
        for stream in (False, True):
            answer = send(server.url + CHAT, ask(CHAT, stream=stream), origin=origin, **{"x-api-key": "k"})
            assert said(CHAT, answer) == "yes" and answer.headers["access-control-allow-origin"] == origin
            exposed = set(answer.headers["access-control-expose-headers"].split(", "))
            assert {"x-request-id", "x-abyssal-repaired", "x-abyssal-notes", "retry-after"} <= exposed
        refused = send(server.url + CHAT, ask(CHAT), origin=origin)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
        answer = send(server.url + CHAT, method="OPTIONS", **{**asking, "origin": "https://other.example"})
        assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers


# the engine's thread


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCompleter]:
    tokenizer = Tokenizer(bundled_folder())
    engine = Engine(load_model(bundled_folder()).requires_grad_(False), budget=1 << 27, slots=4)
    completer = LocalCompleter(engine, tokenizer, "nano")
    yield completer
    completer.close()


def completion(max_tokens: int, token: int = 300) -> Completion:
    return Completion(prompt=[1, token, 301], max_tokens=max_tokens, sampling=Sampling(temperature=0))


async def answer_tokens(local: LocalCompleter, token: int = 300) -> int:
    return len([part async for part in local.complete(completion(5, token)) if isinstance(part, Continued)])


def test_who_leaves_before_the_engine_took_the_request_leaves_nothing(local: LocalCompleter) -> None:
    async def leave() -> None:
        for _ in range(20):
            asked = asyncio.ensure_future(anext(local.complete(completion(10_000))))
            await asyncio.sleep(0)  # the engine is asked, and has not answered
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        assert await answer_tokens(local) == 5  # all others were asked for before

    asyncio.run(leave())
    eventually(lambda: not local.engine.busy and not local.engine.records)


def test_a_request_that_breaks_the_engine_breaks_alone(
    local: LocalCompleter, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = local.engine.add

    def add(request: Any) -> int:
        if 999 in request.prompt:
            raise ZeroDivisionError
        return added(request)

    async def three() -> list[Any]:
        asked = (answer_tokens(local, token) for token in (300, 999, 302))
        return await asyncio.gather(*asked, return_exceptions=True)

    monkeypatch.setattr(local.engine, "add", add)
    first, second, third = asyncio.run(three())
    assert first == third == 5 and isinstance(second, ZeroDivisionError)


def test_requests_of_an_event_loop_that_closed_end(local: LocalCompleter) -> None:
    left = local.complete(completion(100_000))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(left))  # type: ignore[arg-type]
    loop.close()  # without closing the iterator, which asyncio.run would do
    eventually(lambda: not local.engine.busy)
    assert asyncio.run(answer_tokens(local)) == 5


def test_a_long_prompt_holds_nobody_up(local: LocalCompleter, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is encoded beside the loop."""
    threads: list[int] = []
    encode = local.tokenizer.encode_pieces

    def encoded(pieces: Any) -> list[int]:
        threads.append(threading.get_ident())
        return encode(pieces)

    monkeypatch.setattr(local.tokenizer, "encode_pieces", encoded)

    async def ask_with(text: str) -> None:
        asked = Completion(prompt=[Piece(text)], max_tokens=1, sampling=Sampling())
        with contextlib.suppress(InputError):
            await anext(local.complete(asked))

    asyncio.run(ask_with("short"))
    asyncio.run(ask_with("long " * 100_000))
    assert threads[0] == threading.get_ident() != threads[1]
