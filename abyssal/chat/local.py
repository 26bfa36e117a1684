"""Our engine as a completer: one thread steps it, any number of coroutines wait for its events."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from abyssal.base.errors import AbyssalError, RunError
from abyssal.chat.api import Accepted, Completion, Continued, PromptUse, TokenInfo
from abyssal.encoding.literals import EOS
from abyssal.encoding.snapshots import Snapshot
from abyssal.encoding.tokenizer import Piece, Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.request import Event, Request
from abyssal.engine.sampler import Sampling


@dataclass
class _Waiting:
    """Who waits for the events of a request."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | BaseException]

    def tell(self, what: Event | BaseException) -> None:
        """Hand something over, from the engine's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, what)


class LocalCompleter:
    """A model in this process.

    Args:
        engine: used by this object's thread alone from now on.
        tokenizer: the model's.
        model: its name.
        snapshot: whose encoding it knows.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, snapshot: Snapshot = "april"):
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = model
        self.snapshot: Snapshot = snapshot
        self.context = engine.model.config.max_position_embeddings
        self._end = tokenizer.special(EOS)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[int, _Waiting] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.tokenizer.token_bytes(token)

    def count(self, prompt: Sequence[Piece]) -> int:
        """Tokens of a prompt."""
        return len(self.tokenizer.encode_pieces(prompt))

    def close(self) -> None:
        """Stop the thread; what runs is cancelled."""
        self._commands.put(None)
        self._thread.join()

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Continue a prompt; see `Completer`."""
        prompt = tuple(self.tokenizer.encode_pieces(completion.prompt))
        s = completion.sampling
        request = Request(
            prompt=prompt,
            max_tokens=completion.max_tokens or self.context,
            sampling=Sampling(
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p,
                presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty,
                repetition_penalty=s.repetition_penalty, logit_bias=dict(s.logit_bias), seed=s.seed,
            ),
            stop=(self._end,),
            n=completion.n,
            top_logprobs=completion.top_logprobs,
        )  # fmt: skip
        waiting = _Waiting(asyncio.get_running_loop(), asyncio.Queue())
        number = await self._do(lambda: self._add(request, waiting))
        streams = [self.tokenizer.stream(keep_special=True) for _ in range(completion.n)]
        left = completion.n
        said = False
        try:
            yield Accepted()
            while left:
                event = await waiting.events.get()
                if isinstance(event, BaseException):
                    raise event
                if not said:
                    use = self.engine.records[number].prefix
                    yield PromptUse(len(prompt), use.hit, use.reason)
                    said = True
                left -= event.finish is not None
                text = "" if event.token is None else streams[event.choice].add(event.token)
                if event.finish is not None:
                    text += streams[event.choice].finish()
                info = None if event.token is None else TokenInfo(event.token, event.logprob, event.top)
                finish = "failed" if event.finish == "cancelled" else event.finish
                yield Continued(event.choice, text, info, finish, event.error)
        finally:
            self._commands.put(lambda: self._remove(number))

    async def _do(self, work: Callable[[], int]) -> int:
        """Run something on the engine's thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()

        def run() -> None:
            try:
                result = work()
            except AbyssalError as error:
                loop.call_soon_threadsafe(_fail, done, error)
            else:
                loop.call_soon_threadsafe(_succeed, done, result)

        if not self._thread.is_alive():
            raise RunError("the engine has stopped: start the server again")
        self._commands.put(run)
        return await done

    def _add(self, request: Request, waiting: _Waiting) -> int:
        number = self.engine.add(request)
        self._waiting[number] = waiting
        return number

    def _remove(self, number: int) -> None:
        self._waiting.pop(number, None)
        self.engine.cancel(number)
        self.engine.records.pop(number, None)

    def _work(self) -> None:
        """The engine's thread: commands between steps, and sleep when there is nothing to do."""
        try:
            while True:
                while not self.engine.busy or not self._commands.empty():
                    command = self._commands.get()
                    if command is None:
                        return
                    command()
                for event in self.engine.step():
                    waiting = self._waiting.get(event.request)
                    if waiting is not None:
                        waiting.tell(event)
        except BaseException as error:
            for waiting in self._waiting.values():
                waiting.tell(RunError(f"the engine failed ({error}): see the log"))
            raise


def _succeed(future: asyncio.Future[int], result: int) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[int], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
