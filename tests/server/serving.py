"""A real server on a free port of the loopback, around any completer."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from abyssal.base.errors import TokenError
from abyssal.chat.api import Accepted, Completer, Completion, Continued, PromptUse, TokenInfo
from abyssal.encoding.literals import EOS
from abyssal.encoding.render import prompt_text
from abyssal.encoding.snapshots import Snapshot
from abyssal.encoding.tokenizer import Piece
from abyssal.server.app import Server, Settings


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
        self.active = 0

    def token_bytes(self, token: int) -> bytes:
        """The character."""
        return chr(token).encode()

    def count(self, prompt: Sequence[Piece]) -> int:
        """Characters."""
        return len(prompt_text(prompt))

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Say the script."""
        import asyncio

        prompt = prompt_text(completion.prompt)
        if len(prompt) >= self.context:
            raise TokenError(f"the prompt has {len(prompt)} tokens, the context holds {self.context}: shorten it")
        self.prompts.append(prompt)
        self.active += 1
        try:
            yield Accepted()
            yield PromptUse(len(prompt), len(prompt) // 2)
            text = self.script(prompt)
            pieces = [*text, EOS]
            limit = completion.max_tokens or len(pieces)
            for choice in range(completion.n):
                for i, piece in enumerate(pieces[:limit]):
                    await asyncio.sleep(self.pause)
                    last = i == min(len(pieces), limit) - 1
                    finish = None if not last else "stop" if piece == EOS else "length"
                    info = TokenInfo(ord(piece[0]), -0.5, ((ord(piece[0]), -0.5),) * min(completion.top_logprobs, 1))
                    yield Continued(choice, piece, info, finish)  # type: ignore[arg-type]
        finally:
            self.active -= 1


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
