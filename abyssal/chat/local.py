"""Our engine as a completer: one thread steps it, any number of coroutines wait for its events."""

from __future__ import annotations

import asyncio
import codecs
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from abyssal.base.errors import CapacityError, ContextError, RunError, TokenError
from abyssal.chat.api import Accepted, Completion, Continued, Load, PromptUse, TokenInfo
from abyssal.chat.constrain.calls import lark_text
from abyssal.encoding.literals import EOS, THINK_END
from abyssal.encoding.snapshots import Snapshot
from abyssal.encoding.tokenizer import Piece, Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.grammar import Grammar
from abyssal.engine.request import Event, Request
from abyssal.engine.sampler import Sampling

LONG = 1 << 16  # characters of a prompt whose encoding would hold up the loop
BANNED = -100.0  # bias of a token that must not come


class _Plain:
    """All of it, as soon as characters are whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._stream = tokenizer.stream(keep_special=True)

    def add(self, event: Event) -> str:
        """What one more event makes certain."""
        text = "" if event.token is None else self._stream.add(event.token)
        return text + self._stream.finish() if event.finish is not None else text


class _Stopping:
    """What no stop string can still take back."""

    def __init__(self, tokenizer: Tokenizer):
        self._bytes_of = tokenizer.token_bytes
        self._raw = bytearray()
        self._given = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, event: Event) -> str:
        """What one more event makes certain."""
        if event.token is not None:
            self._raw += self._bytes_of(event.token)
        settled = len(self._raw) if event.settled is None else event.settled
        new, self._given = bytes(self._raw[self._given : settled]), settled
        return self._decoder.decode(new, event.finish is not None)


class _Waiting:
    """Who waits for the events of a request, and those that have come."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._come: deque[Event | BaseException] = deque()
        self._wanted: asyncio.Future[None] | None = None

    def put(self, what: Event | BaseException) -> None:
        """Take one more, in the loop's thread."""
        self._come.append(what)
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    async def get(self) -> Event:
        """The next one."""
        while not self._come:
            self._wanted = self.loop.create_future()
            await self._wanted
        what = self._come.popleft()
        if isinstance(what, BaseException):
            raise what
        return what


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

    def encode(self, prompt: Sequence[Piece]) -> list[int]:
        """Token ids of a prompt."""
        return self.tokenizer.encode_pieces(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return self.tokenizer.decode(ids, keep_special=True)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.tokenizer.token_bytes(token)

    def special(self, text: str) -> int | None:
        """The id of a special token, or None."""
        try:
            return self.tokenizer.special(text)
        except TokenError:
            return None

    def count(self, prompt: Sequence[Piece]) -> int:
        """Tokens of a prompt."""
        return len(self.encode(prompt))

    def load(self) -> Load:
        """What the engine is busy with; read beside its thread, so perhaps a step old."""
        pages = self.engine.memory.pages
        use = self.engine.expert_use
        experts = (use.hits, use.misses, use.bytes_read) if use is not None else ()
        return Load(self.engine.running, self.engine.waiting, 1 - pages.free / max(pages.count, 1), *experts)

    def interrupt(self) -> None:
        """End everything that runs."""
        self._commands.put(self._interrupt)

    def _interrupt(self) -> None:
        self._tell([event for number in self._waiting for event in self.engine.cancel(number)])

    def close(self) -> None:
        """Stop the thread; what runs is cancelled."""
        self._commands.put(None)
        self._thread.join()

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Continue a prompt; see `Completer`."""
        if sum(len(piece.text) for piece in completion.prompt if isinstance(piece, Piece)) > LONG:
            request = await asyncio.to_thread(self._request, completion)
        else:
            request = self._request(completion)
        prompt = request.prompt
        waiting = _Waiting()
        number = await self._added(request, waiting)
        record = self.engine.records[number]
        kind: type[_Stopping] | type[_Plain] = _Stopping if completion.stop else _Plain
        texts = [kind(self.tokenizer) for _ in range(completion.n)]
        left = completion.n
        said = False
        try:
            yield Accepted()
            while left:
                event = await waiting.get()
                if not said:
                    ids = prompt if completion.trace else ()
                    scores = tuple(TokenInfo(s.token, s.logprob, s.top) if s else None for s in record.scores)
                    yield PromptUse(len(prompt), record.prefix.hit, record.prefix.reason, ids, scores)
                    said = True
                left -= event.finish is not None
                text = texts[event.choice].add(event)
                info = None
                if event.token is not None:
                    info = TokenInfo(event.token, event.logprob, event.top, event.blocks)
                finish = "interrupted" if event.finish == "cancelled" else event.finish
                yield Continued(event.choice, text, info, finish, event.error)
        finally:
            self._commands.put(lambda: self._remove(number))

    def _request(self, completion: Completion) -> Request:
        """The engine's form of a completion."""
        given = completion.prompt
        ids = tuple(piece for piece in given if isinstance(piece, int))
        prompt = ids or tuple(self.encode([piece for piece in given if isinstance(piece, Piece)]))
        s = completion.sampling
        bias = dict(s.logit_bias) | {self.tokenizer.special(text): BANNED for text in completion.banned}
        grammar = None
        bound = completion.constraint
        if bound is not None:
            grammar = Grammar("lark", lark_text(bound.grammar, self.tokenizer.special))
        close = None
        if completion.max_reasoning is not None:
            close = (self.tokenizer.special(THINK_END), completion.max_reasoning)
        # what nobody can have is no reason to refuse: agents ask for much and use little
        most = max(self.engine.most_tokens(len(prompt), completion.n), 1)
        return Request(
            prompt=prompt,
            max_tokens=min(completion.max_tokens or most, most),
            sampling=Sampling(
                temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p,
                presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty,
                repetition_penalty=s.repetition_penalty, logit_bias=bias, seed=s.seed,
            ),
            stop=(self._end,),
            stop_strings=completion.stop,
            n=completion.n,
            top_logprobs=completion.top_logprobs or 0,
            grammar=grammar,
            grammar_after=tuple(self.tokenizer.special(text) for text in bound.after) if bound else (),
            close=close,
            score_prompt=completion.score_prompt,
            trace=completion.trace,
        )  # fmt: skip

    async def _added(self, request: Request, waiting: _Waiting) -> int:
        """The number of a request, once the engine has taken it.

        Raises:
            AbyssalError: the engine refused it.
        """
        done: asyncio.Future[int] = waiting.loop.create_future()

        def add() -> None:
            result: int | Exception
            try:
                result = self.engine.add(request)
                self._waiting[result] = waiting
            except CapacityError as error:  # of a request that could never fit; others wait
                result = ContextError(str(error))
            except Exception as error:  # whatever is wrong with one request must not end the others
                result = error
            if not self._call(waiting.loop, answer, result) and isinstance(result, int):
                self._remove(result)

        def answer(result: int | Exception) -> None:
            if not done.cancelled():
                if isinstance(result, int):
                    done.set_result(result)
                else:
                    done.set_exception(result)
            elif isinstance(result, int):  # who asked has left in the meantime
                self._commands.put(lambda: self._remove(result))

        if not self._thread.is_alive():
            raise RunError("the engine has stopped: start the server again")
        self._commands.put(add)
        return await done

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
                self._tell(self.engine.step())
        except BaseException as error:
            for waiting in self._waiting.values():
                self._call(waiting.loop, waiting.put, RunError(f"the engine failed ({error}): see the log"))
            raise

    def _tell(self, events: Sequence[Event]) -> None:
        """Hand events over to who waits for them, all of a step at once: each call wakes the loop."""
        found: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, Event]]] = {}
        for event in events:
            waiting = self._waiting.get(event.request)
            if waiting is not None:
                found.setdefault(waiting.loop, []).append((waiting, event))
        for loop, those in found.items():
            if not self._call(loop, _put, those):
                for _, event in those:
                    self._remove(event.request)

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, what: Callable[[Any], None], value: object) -> bool:
        """Call in the loop's thread; False if the loop is closed, so that nobody waits in it any more."""
        try:
            loop.call_soon_threadsafe(what, value)
        except RuntimeError:
            return False
        return True


def _put(events: Sequence[tuple[_Waiting, Event]]) -> None:
    for waiting, event in events:
        waiting.put(event)
