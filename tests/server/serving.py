"""A real server on a free port of the loopback, around any completer."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from abyssal.base.errors import ContextError
from abyssal.chat.api import Accepted, Completer, Completion, Continued, Load, PromptUse, TokenInfo
from abyssal.encoding.literals import DSML, EOS
from abyssal.encoding.render import prompt_text
from abyssal.encoding.snapshots import Snapshot
from abyssal.encoding.tokenizer import Piece
from abyssal.server.app import Server
from abyssal.server.settings import Settings


class Scripted:
    """Answers that a test wrote, one character a token: the wire is what is tested.

    Args:
        script: from the prompt's text to the completion; EOS is added.
        pause: seconds between tokens.
    """

    model = "nano"
    snapshot: Snapshot = "april"

    def __init__(self, script: Callable[[str], str], pause: float = 0.0, context: int = 1 << 20):
        self.script, self.pause, self.context = script, pause, context
        self.prompts: list[str] = []
        self.completions: list[Completion] = []
        self.active = 0
        self.experts: int | None = None  # as if so many had been in memory, and read, and bytes of them
        self.interrupted = False

    def encode(self, prompt: Sequence[Piece]) -> list[int]:
        """Characters."""
        return [ord(c) for c in prompt_text(prompt)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of characters."""
        wrong = next((i for i in ids if not 0 <= i < 0xD800), None)
        if wrong is not None:
            raise ContextError(f"token {wrong} is out of range")
        return "".join(map(chr, ids))

    def token_bytes(self, token: int) -> bytes:
        """The character."""
        return chr(token).encode()

    def special(self, text: str) -> int | None:
        """There are none."""
        return None

    def count(self, prompt: Sequence[Piece]) -> int:
        """Characters."""
        return len(prompt_text(prompt))

    def load(self) -> Load:
        """Requests that run."""
        return Load(self.active, expert_hits=self.experts, expert_misses=self.experts, expert_bytes=self.experts)

    def interrupt(self) -> None:
        """End what runs at its next token."""
        self.interrupted = True

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Say the script."""
        import asyncio

        prompt = "".join(p.text if isinstance(p, Piece) else self.decode([p]) for p in completion.prompt)
        if len(prompt) >= self.context:
            raise ContextError(f"the prompt has {len(prompt)} tokens, the context holds {self.context}: shorten it")
        self.prompts.append(prompt)
        self.completions.append(completion)
        self.active += 1
        try:
            yield Accepted()
            ids = tuple(map(ord, prompt)) if completion.trace else ()
            yield PromptUse(len(prompt), len(prompt) // 2, ids=ids)
            text = self.script(prompt)
            pieces = [*text, EOS]
            limit = completion.max_tokens or len(pieces)
            for choice in range(completion.n):
                for i, piece in enumerate(pieces[:limit]):
                    await asyncio.sleep(self.pause)
                    if self.interrupted:
                        yield Continued(choice, "", None, "interrupted")
                        break
                    last = i == min(len(pieces), limit) - 1
                    finish = None if not last else "stop" if piece == EOS else "length"
                    top = ((ord(piece[0]), -0.5),) if completion.top_logprobs else ()
                    info = TokenInfo(ord(piece[0]), -0.5, top)
                    yield Continued(choice, piece, info, finish)  # type: ignore[arg-type]
        finally:
            self.active -= 1


def script(prompt: str) -> str:
    """Call the tool, then say what it returned; think if asked to."""
    thought = "I look it up.</think>" if prompt.endswith("<think>") else ""
    if "<tool_result>" in prompt:
        return thought + "It is " + prompt.rsplit("<tool_result>", 1)[1].split("</tool_result>")[0] + "."
    if "get_weather" in prompt:
        return (
            f'{thought}Let me see.\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n'
            f'<{DSML}parameter name="city" string="true">Oslo "N"</{DSML}parameter>\n'
            f'<{DSML}parameter name="days" string="false">2</{DSML}parameter>\n'
            f"</{DSML}invoke>\n</{DSML}tool_calls>"
        )
    return thought + "Hello, world! STOP here."


@contextmanager
def serving(completer: Completer, settings: Settings | None = None) -> Iterator[str]:
    """The base URL of a running server."""
    config = uvicorn.Config(Server(completer, settings).app(), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
