"""Many requests at once over one model: admission, steps, events.

A step takes the plan of the scheduler, runs one pass and turns its logits into tokens. Memory is bounded: a
request that could never fit is refused when it comes, one that does not fit now waits, and if answers outgrow
the memory, the youngest gives its pages back and is read again later. The tokens of a request do not depend
on any of this.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.base.errors import CapacityError, CheckpointError, ContextError, InputError, TokenError
from abyssal.base.machine import this_machine
from abyssal.checkpoint.expert_cache import ExpertUse
from abyssal.engine import speculative
from abyssal.engine.answer import Running
from abyssal.engine.grammar import GrammarCompiler
from abyssal.engine.prefix_cache import PrefixCache
from abyssal.engine.request import Answer, Event, PrefixUse, Request, Score
from abyssal.engine.runner import Runner
from abyssal.engine.sampler import Sampler
from abyssal.engine.scheduler import Job, Work, plan
from abyssal.engine.stop import StopStrings
from abyssal.kvcache.memory import Memory
from abyssal.kvcache.sequence import SequenceCache
from abyssal.model import Transformer

STEP_TOKENS = 1024
SLOTS = 64
PROMPTS_AT_ONCE = 4  # being read; those behind them can then reuse what they share
SHARE_OF_FREE = 0.5  # of the free memory, for the cache, unless a budget is given
SCORED_ROWS = 64  # rows of a prompt whose logits are held at once
TINY = 1e-9


@dataclass
class Record:
    """What a request cost and gave; filled while it runs.

    Attributes:
        prompt_tokens: length of the prompt.
        prefix: what the prefix cache had of it.
        read: tokens of the prompt that were reused or read so far.
        answers: one for each choice.
        queued_s, prefill_s: seconds until it was admitted, and from there to its first token.
        decode_s: seconds from the first token to the last.
        drafted, accepted: tokens that the MTP block drafted, and how many of them stood.
        preempted: how often it gave its memory back and was read again.
        scores: of the prompt's tokens, if they were asked for; the first has none.
    """

    prompt_tokens: int
    answers: list[Answer]
    prefix: PrefixUse = field(default_factory=PrefixUse)
    read: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    scores: list[Score | None] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        """Speed of the part of the prompt that was not reused."""
        return (self.prompt_tokens - self.prefix.hit + self.prefix.recomputed) / max(self.prefill_s, TINY)

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of the tokens after the first, over all choices; 0 if there is only one."""
        count = sum(len(answer.tokens) for answer in self.answers) - len(self.answers)
        return count / self.decode_s if self.decode_s else 0.0


class Engine:
    """Requests in, events out. Not thread-safe: one thread adds, steps and cancels.

    Args:
        model: the model, in memory or with its experts on disk.
        budget: bytes for pages and slots; by default half of the free memory.
        slots: sequences that may run at once.
        step_tokens: tokens of a step, over all requests.
        prefix: makes the prefix cache over the engine's memory, or None for no reuse.
        grammars: makes the compiler of grammars, when the first one comes; None if requests may have none.
        token_bytes: bytes of a token, which stop strings need.
        expert_use: what a model on disk counts of its experts.

    Raises:
        InputError: the budget holds not even one slot and one page.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        budget: int | None = None,
        slots: int = SLOTS,
        step_tokens: int = STEP_TOKENS,
        prefix: Callable[[Memory], PrefixCache] | None = None,
        grammars: Callable[[], GrammarCompiler] | None = None,
        token_bytes: Callable[[int], bytes] | None = None,
        expert_use: ExpertUse | None = None,
    ):
        self.model = model
        self.expert_use = expert_use
        self.runner = Runner(model)
        self.step_tokens = step_tokens
        self.memory = self._memory(budget, slots)
        self.prefix = prefix(self.memory) if prefix is not None else None
        self.records: dict[int, Record] = {}
        self._make_grammars = grammars
        self._grammars: GrammarCompiler | None = None
        self._token_bytes = token_bytes
        self._numbers = itertools.count()
        self._arrivals = itertools.count()
        self._waiting: deque[Running] = deque()
        self._running: dict[int, Running] = {}
        self._steps = 0
        self._exp = np.zeros(0)

    def _memory(self, budget: int | None, slots: int) -> Memory:
        if budget is None:
            budget = int(this_machine().memory_available * SHARE_OF_FREE)
        tiny = self.model.new_memory(pages=0, slots=0)
        pages = (budget - slots * tiny.slot_bytes) // max(tiny.page_bytes, 1)
        if pages < 1:
            need = slots * tiny.slot_bytes + tiny.page_bytes
            raise InputError(
                f"a cache of {budget / 1e9:.3f} GB holds no page beside {slots} slots:"
                f" give at least {need / 1e9:.3f} GB, or fewer slots"
            )
        # no sequence needs more than the context, and pages without bytes (window-only models) cost nothing
        most = slots * tiny.pages_for(self.model.config.max_position_embeddings)
        return self.model.new_memory(pages=min(pages, most), slots=slots)

    # requests

    def add(self, request: Request) -> int:
        """Check a request and queue it; returns its number.

        Raises:
            TokenError: the prompt is empty, or has ids outside the vocabulary.
            ContextError: the prompt is longer than the context.
            InputError: something else cannot be done: grammar, stop strings, drafts.
            CapacityError: it needs more memory than there is at all.
        """
        context, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        prompt = request.prompt
        if not prompt:
            raise TokenError("the prompt is empty: give at least one token")
        if len(prompt) >= context:
            raise ContextError(f"the prompt has {len(prompt)} tokens, the context holds {context}: shorten it")
        for name, ids in (("token", prompt), ("stop token", request.stop), ("biased", request.sampling.logit_bias)):
            bad = next((t for t in ids if not 0 <= t < vocabulary), None)
            if bad is not None:
                raise TokenError(f"{name} id {bad} is outside the vocabulary: use 0..{vocabulary - 1}")
        if request.drafts and not self.model.mtp:
            raise InputError("this model has no MTP block: ask for 0 drafts")
        if request.stop_strings and self._token_bytes is None:
            raise InputError("stop strings need a tokenizer: give the engine token_bytes, or use stop tokens")
        matcher = None
        if request.grammar is not None:
            if self._grammars is None:
                if self._make_grammars is None:
                    raise InputError("a grammar needs a tokenizer: give the engine a grammar compiler")
                self._grammars = self._make_grammars()
            matcher = self._grammars.start(request.grammar)
        limit = min(len(prompt) + request.max_tokens, context)
        self._check_size(request, limit)
        number = next(self._numbers)
        runs = []
        for choice in range(request.n):
            stops = StopStrings(request.stop_strings, self._token_bytes) if self._token_bytes else None
            run = Running(
                next(self._arrivals), number, choice, request, list(prompt), limit,
                Sampler(request.sampling, choice), stops if request.stop_strings else None,
            )  # fmt: skip
            run.arrived = run.number
            if matcher is not None:
                started = matcher.copy()
                run.matcher, run.pending = (None, started) if request.grammar_after else (started, None)
            runs.append(run)
        runs[0].siblings = runs[1:]
        self.records[number] = Record(len(prompt), [Answer() for _ in runs])
        if request.score_prompt:
            self.records[number].scores = [None] * len(prompt)
        self._waiting.append(runs[0])
        return number

    def most_tokens(self, prompt: int, n: int = 1) -> int:
        """Tokens that each of n answers to a prompt of this length may have: what context and memory leave.

        0 or less if not even the prompt fits.
        """
        memory = self.memory
        shared = prompt // memory.page_tokens
        own = (memory.pages.count - shared) // n  # pages of each answer
        if n > memory.slots.count:
            return 0
        return min((shared + own) * memory.page_tokens, self.model.config.max_position_embeddings) - prompt

    def _check_size(self, request: Request, limit: int) -> None:
        memory = self.memory
        shared = len(request.prompt) // memory.page_tokens
        pages = shared + request.n * (memory.pages_for(limit) - shared)
        have = memory.pages.count
        if pages > have or request.n > memory.slots.count:
            need = pages * memory.page_bytes + request.n * memory.slot_bytes
            room = have * memory.page_bytes + memory.slots.count * memory.slot_bytes
            raise CapacityError(
                f"{len(request.prompt)} tokens and {request.n} answers up to {limit} tokens need {need / 1e9:.3f} GB"
                f" of cache in {request.n} slots, there are {room / 1e9:.3f} GB in {memory.slots.count} slots:"
                " give the engine a larger budget, or shorten the request"
            )

    def cancel(self, number: int) -> list[Event]:
        """End a request now and free what it holds; its last events. An unknown or finished number is ignored."""
        runs = [run for run in [*self._waiting, *self._running.values()] if run.request_number == number]
        events = []
        for run in runs:
            for sibling in [run, *run.siblings]:
                events.append(self._end(sibling, Event(number, sibling.choice, None, finish="cancelled")))
        return events

    @property
    def busy(self) -> bool:
        """Whether any request is left."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Answers that wait for memory."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return len(self._running)

    def forget(self, number: int) -> Record:
        """Take a finished request's record out."""
        return self.records.pop(number)

    def stream(self, request: Request, progress: Callable[[int], None] | None = None) -> tuple[int, Iterator[Event]]:
        """Add a request and step until it ends; leaving the iterator cancels it.

        Args:
            progress: called with the tokens of the prompt that are read so far.
        Raises:
            as `add`.
        """
        number = self.add(request)
        return number, self._stream(number, progress)

    def _stream(self, number: int, progress: Callable[[int], None] | None) -> Iterator[Event]:
        record = self.records[number]
        try:
            while any(answer.finish_reason is None for answer in record.answers):
                events = self.step()
                if progress is not None and record.first_token is None:
                    progress(record.read)
                yield from (event for event in events if event.request == number)
        finally:
            self.cancel(number)

    # steps

    def step(self) -> list[Event]:
        """One pass over what the scheduler plans; the tokens that it gave.

        Where weights on disk cannot be read, the requests of the pass fail, and the others go on.
        """
        self._steps += 1
        self._admit()
        jobs = [self._job(run) for run in self._running.values()]
        works = plan(jobs, self.step_tokens, self.step_tokens)
        try:
            drafts = self._drafts(works)
        except CheckpointError as error:
            return self._failed([self._running[work.number] for work in works if work.drafts > 0], error)
        works = self._reserved(works, drafts)
        if not works:
            return []
        runs = [self._running[work.number] for work in works]
        caches = [run.cache for run in runs if run.cache is not None]
        ids = []
        for run, work, cache in zip(runs, works, caches, strict=True):
            run.served = self._steps
            ids.append([*run.tokens[cache.position : cache.position + work.tokens], *drafts.get(run.number, [])])
        with self.runner.working(sum(map(len, ids)), sum(cache.position for cache in caches)):
            try:
                output = self.runner.run(caches, ids, watch=any(run.request.trace for run in runs))
            except CheckpointError as error:
                return self._failed(runs, error)
            for i, run in enumerate(runs):
                if run.request.trace:
                    run.blocks = tuple(array("I", layer[i].tolist()) for layer in output.chosen)
            return self._after(runs, ids, output.z_TD, output.streams_TND)

    def _failed(self, runs: Sequence[Running], error: CheckpointError) -> list[Event]:
        """End answers whose pass broke off: their memory was written in part."""
        return [
            self._end(sibling, Event(run.request_number, sibling.choice, None, finish="failed", error=str(error)))
            for run in runs
            for sibling in [run, *run.siblings]
        ]

    def _job(self, run: Running) -> Job:
        assert run.cache is not None
        most = run.left
        if self.prefix is not None and run.left > 1:
            most = max(self.prefix.stop_before(run.cache.position, len(run.tokens)) - run.cache.position, 1)
        return Job(run.number, run.left, most, self._wanted_drafts(run), run.served)

    @staticmethod
    def _wanted_drafts(run: Running) -> int:
        if run.matcher is not None or run.streams_TND is None or not run.answer:
            return 0
        return min(run.request.drafts, run.limit - len(run.tokens) - 1)

    def _drafts(self, works: Sequence[Work]) -> dict[int, list[int]]:
        drafting = [work for work in works if work.drafts > 0]
        if not drafting:
            return {}
        runs = [self._running[work.number] for work in drafting]
        with self.runner.working(len(runs)):
            found = speculative.propose(self.runner, runs, [work.drafts for work in drafting])
        for run, tokens in zip(runs, found, strict=True):
            self.records[run.request_number].drafted += len(tokens)
        return {run.number: tokens for run, tokens in zip(runs, found, strict=True)}

    def _after(
        self, runs: Sequence[Running], ids: Sequence[Sequence[int]], z_TD: Tensor, streams_TND: Tensor
    ) -> list[Event]:
        """Turn the results of a pass into tokens."""
        events: list[Event] = []
        rows: list[int] = []
        begins: dict[int, int] = {}
        first = 0
        for run, tokens in zip(runs, ids, strict=True):
            assert run.cache is not None
            if run.request.drafts and self.model.mtp:
                window = self.model.config.sliding_window
                streams = streams_TND[first : first + len(tokens)]
                speculative.remember_streams(run, streams, run.cache.position, window)
            extra = run.cache.position - len(run.tokens)
            if extra >= 0:  # every known token is read: the rows of the last one and of the drafts count
                begins[run.number] = len(rows)
                rows += range(first + len(tokens) - 1 - extra, first + len(tokens))
            if run.request.score_prompt:
                self._score(run, z_TD[first : first + len(tokens)], run.cache.position - len(tokens))
            first += len(tokens)
            self._note_prompt(run)
        logits = self.runner.logits(z_TD.index_select(0, torch.tensor(rows))) if rows else np.zeros((0, 0))
        for run, tokens in zip(runs, ids, strict=True):
            if run.number in begins:
                begin = begins[run.number]
                extra = (run.cache.position if run.cache is not None else 0) - len(run.tokens)
                drafted = list(tokens[len(tokens) - extra :]) if extra else []
                for sibling in self._split(run):
                    events += self._choose(sibling, logits[begin : begin + extra + 1], drafted)
        return events

    def _score(self, run: Running, z_TD: Tensor, start: int) -> None:
        """Log-probabilities of the prompt's tokens behind each of these rows, which begin at `start`."""
        record, prompt = self.records[run.request_number], run.request.prompt
        for first in range(0, len(z_TD), SCORED_ROWS):
            rows = z_TD[first : first + SCORED_ROWS]
            if start + first + 1 >= len(prompt):
                return
            for i, logits in enumerate(self.runner.logits(rows)):
                place = start + first + i + 1
                if place < len(prompt):
                    shift, whole = self._whole(logits)
                    top = _likeliest(logits - shift - whole, run.request.top_logprobs)
                    record.scores[place] = Score(prompt[place], float(logits[prompt[place]] - shift - whole), top)

    def _note_prompt(self, run: Running) -> None:
        """Keep what is complete in the prefix cache."""
        assert run.cache is not None
        record = self.records[run.request_number]
        record.read = max(record.read, min(run.cache.position, record.prompt_tokens))
        if self.prefix is None or run.cache.since:
            return
        size = self.memory.page_tokens
        sure = min(run.cache.position, len(run.tokens))
        if run.node is None or sure // size > run.node.depth or run.node.dropped:
            run.node = self.prefix.insert(run.cache, run.tokens, sure, run.node)
            run.cache.known = run.node.depth * size
        if self.prefix.wants_rings(run.node.depth * size, len(run.request.prompt)):
            self.prefix.keep_rings(run.cache, run.node)

    def _split(self, run: Running) -> list[Running]:
        """The answer and, after its prompt is read, its siblings, which share what was read."""
        siblings, run.siblings = run.siblings, []
        for sibling in siblings:
            assert run.cache is not None
            sibling.cache = run.cache.fork()
            sibling.mtp_position, sibling.mtp_since = run.mtp_position, run.mtp_since
            sibling.streams_TND = run.streams_TND
            sibling.node = run.node
            sibling.blocks = run.blocks
            self._running[sibling.number] = sibling
        return [run, *siblings]

    def _choose(self, run: Running, logits_RV: NDArray[np.float64], drafted: Sequence[int]) -> list[Event]:
        """Draw the next tokens: one, and one more for every draft that stood."""
        assert run.cache is not None
        record = self.records[run.request_number]
        now = time.monotonic()
        if record.first_token is None:
            record.first_token = now
            record.prefill_s = now - (record.admitted or record.began)
        record.decode_s = now - record.first_token
        events: list[Event] = []
        read = len(run.tokens)
        for row, logits in enumerate(logits_RV):
            if not np.isfinite(logits).all():
                error = "the model gave logits that are not finite: its weights are damaged"
                failed = Event(run.request_number, run.choice, None, finish="failed", error=error)
                return [*events, self._end(run, failed)]
            event = self._token(run, logits)
            events.append(event)
            if event.finish is not None:
                return events
            if row < len(drafted):
                if event.token != drafted[row]:
                    break
                read += 1
                record.accepted += 1
        # drafts that did not stand are forgotten; the MTP block goes on behind those that did
        spare = run.cache.position - read
        if spare:
            run.cache.rewind(read)
            if run.streams_TND is not None:
                run.streams_TND = run.streams_TND[:-spare]
        return events

    def _token(self, run: Running, logits: NDArray[np.float64]) -> Event:
        request = run.request
        allowed = run.matcher.allowed() if run.matcher is not None else None
        if run.matcher is not None and run.matcher.problem is not None:
            error = f"the grammar cannot be followed any further ({run.matcher.problem}): make it simpler"
            return self._end(run, Event(run.request_number, run.choice, None, finish="failed", error=error))
        answer = run.answer
        if request.close is not None and len(answer) >= request.close[1] and request.close[0] not in answer:
            token = request.close[0]
        else:
            token = run.sampler.draw(logits, len(answer), request.prompt, answer, allowed)
        # minus the logarithm of the whole: most requests want the chosen token's alone
        shift, whole = self._whole(logits)
        run.tokens.append(token)
        finish = None
        if token in request.stop or (run.stops is not None and run.stops.add(token)):
            finish = "stop"
        self._advance_grammar(run, token)
        if finish is None and run.matcher is not None and run.matcher.complete:
            finish = "stop"
        if finish is None and len(run.tokens) >= run.limit:
            finish = "length"
        if finish is not None and run.stops is not None and run.stops.found is None:
            run.stops.finish()
        event = Event(
            run.request_number,
            run.choice,
            token,
            float(logits[token] - shift - whole),
            _likeliest(logits - shift - whole, request.top_logprobs) if request.top_logprobs else (),
            finish,  # type: ignore[arg-type]
            run.stops.settled if run.stops is not None else None,
            blocks=run.blocks,
        )
        if finish is not None:
            return self._end(run, event)
        self.records[run.request_number].answers[run.choice].add(event)
        return event

    def _whole(self, logits: NDArray[np.float64]) -> tuple[np.float64, np.float64]:
        """The largest logit, and the logarithm of the sum of exp(logit - largest)."""
        if len(self._exp) != len(logits):
            self._exp = np.empty_like(logits)  # kept: fresh pages of memory cost more than the exponentials
        shift = logits.max()
        np.exp(np.subtract(logits, shift, out=self._exp), out=self._exp)
        return shift, np.log(self._exp.sum())

    def _advance_grammar(self, run: Running, token: int) -> None:
        request = run.request
        if run.matcher is not None:
            run.matcher.accept(token)
        elif run.pending is not None and token == request.grammar_after[run.seen]:
            run.seen += 1
            if run.seen == len(request.grammar_after):
                run.matcher, run.pending = run.pending, None

    def _end(self, run: Running, event: Event) -> Event:
        """Free what an answer holds."""
        if run.cache is not None:
            if self.prefix is not None and event.finish in ("stop", "length") and not run.cache.since:
                # the last token was not read, or as a draft, which is as good as not
                self.prefix.insert(run.cache, run.tokens, len(run.tokens) - 1, run.node)
            run.cache.release()
            run.cache = None
        run.streams_TND = None
        self._running.pop(run.number, None)
        if run in self._waiting:
            self._waiting.remove(run)
        self.records[run.request_number].answers[run.choice].add(event)
        return event

    # memory

    def _admit(self) -> None:
        """Let waiting answers in while there is memory for what they have to read and one page more."""
        reading = sum(1 for run in self._running.values() if run.left > 1)
        while self._waiting and self.memory.slots.free and reading < PROMPTS_AT_ONCE:
            run = self._waiting[0]
            pages = self.memory.pages_for(len(run.tokens)) + len(run.siblings) + 1
            free = self.memory.pages.free
            if self.prefix is not None and pages > free:
                free += self.prefix.evictable
            if pages > free and self._running:
                return
            cache = SequenceCache(self.memory)
            record = self.records[run.request_number]
            if self.prefix is not None and not run.request.score_prompt:
                use, run.node = self.prefix.attach(cache, run.tokens)
                record.prefix = record.prefix if record.admitted is not None else use
            missing = self.memory.pages_for(len(run.tokens)) - len(cache.pages)
            if not self._make_room(missing):
                cache.release()
                return
            self._waiting.popleft()
            reading += 1
            run.cache = cache
            cache.extend(missing)
            run.mtp_position = run.mtp_since = cache.position
            self._running[run.number] = run
            if record.admitted is None:
                record.admitted = time.monotonic()
                record.queued_s = record.admitted - record.began

    def _make_room(self, pages: int) -> bool:
        """Whether so many pages are free, after evicting from the prefix cache."""
        missing = pages - self.memory.pages.free
        if missing > 0 and self.prefix is not None:
            self.prefix.evict(missing)
        return pages <= self.memory.pages.free

    def _reserved(self, works: list[Work], drafts: dict[int, list[int]]) -> list[Work]:
        """The works whose pages are there; the youngest answers are put back if memory is short."""
        done: list[Work] = []
        for work in sorted(works, key=lambda work: self._running[work.number].arrived):
            run = self._running.get(work.number)
            while run is not None and run.cache is not None:
                try:
                    run.cache.reserve(work.tokens + len(drafts.get(work.number, [])))
                    done.append(work)
                    break
                except CapacityError:
                    if self.prefix is not None and self.prefix.evict(1):
                        continue
                    youngest = max(self._running.values(), key=lambda other: other.arrived)
                    self._preempt(youngest)
                    if youngest is run:
                        break
        kept = {work.number for work in done if work.number in self._running}
        return [work for work in works if work.number in kept]

    def _preempt(self, run: Running) -> None:
        """Take an answer's memory; it is read again when there is room."""
        assert run.cache is not None
        run.cache.release()
        run.cache = None
        run.streams_TND = None
        del self._running[run.number]
        self._waiting.appendleft(run)
        self.records[run.request_number].preempted += 1


def _likeliest(logprobs: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    count = min(count, len(logprobs))
    best = np.argpartition(-logprobs, count - 1)[:count]
    best = best[np.lexsort((best, -logprobs[best]))]
    return tuple((int(i), float(logprobs[i])) for i in best)

