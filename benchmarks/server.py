"""What the server adds to the engine: time and work for each token and each request; and how fast answers are parsed.

    python benchmarks/server.py [--streams 1 4 16] [--tokens 256] [--repeat 7] [--out benchmarks/results/server.json]

The bundled model answers the same prompts greedily, each with the same number of tokens (the end token is
forbidden), and nothing is reused between runs. Sides, in turns in one process:

- engine: its steps in a plain loop, events counted. This is the limit.
- completer: the same through `LocalCompleter`, events read by as many coroutines as there are streams.
- http: Chat Completions as streams over real connections. The client is another process, so it costs the server
  nothing but the core that it needs; the model has one thread (OMP_NUM_THREADS), which leaves it one on two cores.
- http, no traces: the same with `--traces 0`, since traces ask the engine for more than tokens.
- sockets: as many pieces of the same size, written to bare connections by asyncio at the engine's pace, with no
  model, no HTTP and no JSON. What it takes is the least that any server in Python takes which sends each token.

Wall time is from the first request to the last byte, as the client sees it; CPU time is of this process, which holds
the engine and the server. Medians over the turns; overheads are differences of medians to the engine's.

The parser is measured in pieces of four characters, as tokens bring them, on prose and on tool calls. Its limits in
the same run: a loop that only looks for "<" in each piece, and `json.loads` of the same text as one JSON string.

What this does not show: requests that arrive over time, slow networks, or a larger model, whose steps take longer
while the server's work for a token stays what it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch and the kernels are imported

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.chat.api import ChatRequest, Continued, Sampling
from abyssal.chat.local import LocalCompleter
from abyssal.chat.turn import completion_of
from abyssal.checkpoint.load import load_model
from abyssal.cli.models import bundled_folder
from abyssal.encoding.literals import DSML, EOS
from abyssal.encoding.messages import Conversation
from abyssal.encoding.parse import Parser
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.model import Transformer
from abyssal.server.app import Server
from abyssal.server.run import _Uvicorn, keep_what_is_loaded
from abyssal.server.settings import Settings

BUDGET = 1 << 28
PIECE = 250  # bytes of a chunk with one token
SENTENCE = "And it came to pass in those days, that there went out a decree. "


@dataclass(frozen=True)
class Took:
    """One run: seconds of wall and CPU, and the answers."""

    wall_s: float
    cpu_s: float
    answers: list[str]


class Bench:
    """The model, and one way to use it for each side."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.special(EOS)
        self.completer = LocalCompleter(self._engine(), tokenizer, "nano")
        self.alone = self._engine()

    def _engine(self) -> Engine:
        return Engine(self.model, budget=BUDGET, slots=32, token_bytes=self.tokenizer.token_bytes)

    def messages(self, number: int) -> list[dict[str, str]]:
        """A conversation that no other has."""
        return [{"role": "user", "content": f"{number}. {SENTENCE * 4}"}]

    def _completion(self, number: int, tokens: int) -> Any:
        sampling = Sampling(temperature=0.0, logit_bias={self.end: -100.0})
        request = ChatRequest(
            messages=Conversation.from_json(self.messages(number), None).messages, thinking=False,
            max_tokens=tokens, sampling=sampling,
        )  # fmt: skip
        return completion_of(self.completer, request, False)

    def engine(self, streams: int, tokens: int) -> Took:
        """The engine alone."""
        engine = self.alone
        wall, cpu = time.perf_counter(), time.process_time()
        requests = [self.completer._request(self._completion(i, tokens)) for i in range(streams)]
        numbers = [engine.add(request) for request in requests]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while engine.busy:
            for event in engine.step():
                if event.token is not None:
                    answers[event.request].append(event.token)
        took = time.perf_counter() - wall, time.process_time() - cpu
        return Took(*took, [self.tokenizer.decode(answers[number]) for number in numbers])

    def through_completer(self, streams: int, tokens: int) -> Took:
        """Through the thread that the server uses."""

        async def one(number: int) -> str:
            parts = self.completer.complete(self._completion(number, tokens))
            return "".join([part.text async for part in parts if isinstance(part, Continued)])

        async def all_of_them() -> list[str]:
            return await asyncio.gather(*(one(number) for number in range(streams)))

        wall, cpu = time.perf_counter(), time.process_time()
        answers = asyncio.run(all_of_them())
        return Took(time.perf_counter() - wall, time.process_time() - cpu, answers)

    @contextmanager
    def http(self, settings: Settings) -> Iterator[Callable[[int, int], Took]]:
        """Through a real server, with a client in a process of its own."""
        uvicorn = _Uvicorn(Server(self.completer, settings))
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        thread = threading.Thread(target=uvicorn.run, args=([listening],))
        thread.start()
        command = [sys.executable, str(Path(__file__)), "--client", str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None and client.stdout is not None

            def run(streams: int, tokens: int) -> Took:
                bodies = [self._body(number, tokens) for number in range(streams)]
                cpu = time.process_time()
                print(json.dumps(bodies), file=client.stdin, flush=True)
                told = json.loads(client.stdout.readline())
                return Took(told["wall_s"], time.process_time() - cpu, told["answers"])

            yield run
            client.stdin.close()
        uvicorn.should_exit = True
        thread.join()

    def _body(self, number: int, tokens: int) -> str:
        return json.dumps({
            "model": "nano", "messages": self.messages(number), "thinking": {"type": "disabled"}, "stream": True,
            "max_tokens": tokens, "temperature": 0, "logit_bias": {str(self.end): -100},
        })  # fmt: skip


def sockets_cpu_s(streams: int, tokens: int, pace_s: float) -> float:
    """CPU seconds of writing a piece to each of some connections, every so many seconds."""

    async def serve() -> float:
        taken: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_server(lambda _, writer: taken.put_nowait(writer), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        command = [sys.executable, __file__, "--read", str(port), "--streams", str(streams)]
        reader = await asyncio.create_subprocess_exec(*command)
        writers = [await taken.get() for _ in range(streams)]
        cpu = time.process_time()
        for _ in range(tokens):
            await asyncio.sleep(pace_s)
            for writer in writers:
                writer.write(b"x" * PIECE)
        cpu = time.process_time() - cpu
        for writer in writers:
            writer.close()
        await reader.wait()
        server.close()
        return cpu

    return asyncio.run(serve())


# the clients' processes


def read(port: int, streams: int) -> None:
    """Read whatever comes on some connections."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(streams)))

    asyncio.run(all_of_them())


async def ask(port: int, body: str) -> bytes:
    """One request on a connection of its own; the whole answer, unread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = body.encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    answer = await reader.read()
    writer.close()
    return answer


def said(raw: bytes) -> str:
    """The content of a stream."""
    assert b" 200 " in raw[:20] and b"data: [DONE]" in raw, raw[:500]
    data = [line[6:] for line in raw.split(b"\n") if line.startswith(b'data: {"')]
    return "".join(choice["delta"].get("content") or "" for one in data for choice in json.loads(one)["choices"])


def client(port: int) -> None:
    """Send each line's bodies at once; tell how long it took, then what came."""

    async def all_of_them(bodies: list[str]) -> list[bytes]:
        return await asyncio.gather(*(ask(port, body) for body in bodies))

    for line in sys.stdin:
        bodies = json.loads(line)
        begin = time.perf_counter()
        raw = asyncio.run(all_of_them(bodies))
        wall = time.perf_counter() - begin
        print(json.dumps({"wall_s": wall, "answers": [said(one) for one in raw]}), flush=True)


# the parser


def parser_rates(repeat: int) -> list[dict[str, Any]]:
    """MB/s of the parser and of its limits, on two kinds of text."""
    prose = "The *answer* is 42 < 43, as `f(x)` says:\n\n- first, é and 雪\n- then the rest of it.\n" * 2500
    code = "if a < b:\n    return `a`\n" * 8
    call = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="edit">\n'
        f'<{DSML}parameter name="path" string="true">src/main.py</{DSML}parameter>\n'
        f'<{DSML}parameter name="lines" string="false">[1, 2, 3]</{DSML}parameter>\n'
        f'<{DSML}parameter name="text" string="true">{code}</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    rows = []
    for name, text in (("prose", prose), ("tool calls", ("Now I edit it." + call) * 400)):
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        as_json = json.dumps(text)
        size = len(text.encode())

        def in_pieces(pieces: list[str] = pieces) -> None:
            parser = Parser(thinking=False)
            for piece in pieces:
                parser.feed(piece)
            parser.finish()

        def at_once(text: str = text) -> None:
            parser = Parser(thinking=False)
            parser.feed(text)
            parser.finish()

        def scan(pieces: list[str] = pieces) -> None:
            for piece in pieces:
                piece.find("<")

        sides: dict[str, Callable[[], object]] = {
            "pieces": in_pieces, "at_once": at_once, "scan": scan, "json_loads": lambda text=as_json: json.loads(text),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeat):
            for side, run in sides.items():
                begin = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - begin)
        row: dict[str, Any] = {"text": name, "bytes": size, "pieces": len(pieces)}
        for side, found in seconds.items():
            row[f"{side}_mb_per_s"] = size / statistics.median(found) / 1e6
        row["us_per_piece"] = 1e6 * statistics.median(seconds["pieces"]) / len(pieces)
        row["of_scan"] = row["pieces_mb_per_s"] / row["scan_mb_per_s"]
        rows.append(row)
    return rows


def main() -> None:
    """Alternate the sides, print tables, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "server.json")
    args = parser.parse_args()
    if args.client is not None:
        return client(args.client)
    if args.read is not None:
        return read(args.read, args.streams[0])
    bench = Bench(load_model(bundled_folder(), keep_stored=True).requires_grad_(False), Tokenizer(bundled_folder()))
    keep_what_is_loaded()
    rows: list[dict[str, Any]] = []
    with bench.http(Settings()) as http, bench.http(Settings(traces=0)) as bare:
        sides: dict[str, Callable[[int, int], Took]] = {
            "engine": bench.engine, "completer": bench.through_completer, "http": http, "http_no_traces": bare,
        }  # fmt: skip
        for side in sides.values():
            side(2, 4)
        for streams, tokens in [*((streams, args.tokens) for streams in args.streams), (1, 1)]:
            runs: dict[str, list[Took]] = {name: [] for name in sides}
            bare_s: list[float] = []
            # single tokens take little time each, so that more of them are needed for a steady median
            for _ in range(args.repeat if tokens > 1 else 8 * args.repeat):
                for name, side in sides.items():
                    runs[name].append(side(streams, tokens))
                if tokens > 1:
                    bare_s.append(sockets_cpu_s(streams, tokens, runs["engine"][-1].wall_s / tokens))
            rows.append(row_of(streams, tokens, runs, bare_s))
            show(rows[-1])
    bench.completer.close()
    parsed = parser_rates(args.repeat)
    for row in parsed:
        print(
            f"parse {row['text']:10s} in pieces {row['pieces_mb_per_s']:6.2f} MB/s ({row['us_per_piece']:.1f} us each),"
            f" at once {row['at_once_mb_per_s']:6.1f}; scan of the pieces {row['scan_mb_per_s']:6.1f},"
            f" json.loads {row['json_loads_mb_per_s']:6.0f}"
        )
    machine = this_machine()
    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "parser": parsed,
    }
    write_json(args.out, result)
    print(json.dumps(result))
    return None


def row_of(streams: int, tokens: int, runs: dict[str, list[Took]], bare_s: list[float]) -> dict[str, Any]:
    """Medians of each side, and what it takes beyond the engine."""
    expected = runs["engine"][0].answers
    row: dict[str, Any] = {"streams": streams, "tokens": tokens}
    for name, found in runs.items():
        wall, cpu = (statistics.median(values) for values in zip(*((t.wall_s, t.cpu_s) for t in found), strict=True))
        row[name] = {
            "wall_s": wall,
            "cpu_s": cpu,
            "tokens_per_s": streams * tokens / wall,
            "equal_answers": all(took.answers == expected for took in found),
        }
    for name in runs:
        for kind in ("wall", "cpu"):
            more = row[name][f"{kind}_s"] - row["engine"][f"{kind}_s"]
            row[name][f"{kind}_overhead"] = more / row["engine"][f"{kind}_s"]
            row[name][f"{kind}_us_per_token"] = 1e6 * more / (streams * tokens)
    if bare_s:
        row["sockets_cpu_us_per_token"] = 1e6 * statistics.median(bare_s) / (streams * tokens)
    return row


def show(row: dict[str, Any]) -> None:
    """One table for people."""
    print(f"{row['streams']} streams of {row['tokens']} tokens" if row["tokens"] > 1 else "a request of one token")
    for name in ("engine", "completer", "http", "http_no_traces"):
        side = row[name]
        print(
            f"  {name:15s} {1e3 * side['wall_s']:8.1f} ms wall {side['wall_overhead']:+7.1%}"
            f" {side['wall_us_per_token']:+8.0f} us a token  {1e3 * side['cpu_s']:8.1f} ms CPU"
            f" {side['cpu_overhead']:+7.1%} {side['cpu_us_per_token']:+8.0f} us a token"
            f"  {side['tokens_per_s']:7.1f} tokens/s{'' if side['equal_answers'] else '  OTHER ANSWERS'}",
            flush=True,
        )
    if "sockets_cpu_us_per_token" in row:
        share = row["sockets_cpu_us_per_token"] * row["streams"] * row["tokens"] / 1e6 / row["engine"]["cpu_s"]
        print(f"  sockets {row['sockets_cpu_us_per_token']:.0f} us CPU a token, {share:.1%} of the engine's")


if __name__ == "__main__":
    main()
