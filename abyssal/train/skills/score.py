"""All suites over a release: `score` is what `abyssal train score` calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from abyssal.base.errors import InputError
from abyssal.chat.local import LocalCompleter
from abyssal.checkpoint.identity import identity_of
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.release import Release
from abyssal.encoding.literals import EOS
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.engine.engine import SLOTS, Engine
from abyssal.engine.grammar import GrammarCompiler
from abyssal.engine.prefix_cache import PrefixCache
from abyssal.kernels.choice import native
from abyssal.train.data.corpora import KINDS, read_corpus
from abyssal.train.data.retrieval import sentences_of
from abyssal.train.skills.arithmetic import score_arithmetic
from abyssal.train.skills.asking import AT_ONCE, Bench
from abyssal.train.skills.bits import score_bits
from abyssal.train.skills.chat import score_chat
from abyssal.train.skills.copying import score_copying
from abyssal.train.skills.journal import Journal
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.retrieval import score_retrieval
from abyssal.train.skills.tools import score_tools

SUITES = ("retrieval", "tools", "arithmetic", "chat", "copying", "bits")
SHORT = 8192  # tokens that each of many requests may take beside one long text
HELD_OUT_FILLER = 1 << 17  # tokens of a text up to which the held-out prose is enough


def score(
    folder: Path | str,
    data: Path | None,
    plan: Plan,
    suites: Sequence[str] = SUITES,
    *,
    journal: Path | None = None,
    seed: int = 0,
    silent: bool = False,
) -> dict[str, Any]:
    """Evaluate a release with its stored weights, through the engine.

    Args:
        folder: the release.
        data: folder that `data.prepare` filled, for prose between facts, known words, and bits per byte. None for
            made-up prose, the generators' words alone, and no bits per byte.
        plan: how much of everything.
        suites: of `SUITES`.
        journal: a file that takes each result as it comes; with it, a killed evaluation goes on. None for none.
        seed: another one gives other items.
        silent: show no progress.
    Returns:
        `release`, `identity` (of its files), `seed`, `plan`, `seconds` by suite, and `suites` with the results.
    Raises:
        InputError: no such suite, or bits per byte without data.
        CheckpointError, ConfigError: the release is wrong.
        DataError: data is missing, or the journal is of another release or seed.
    """
    identity = identity_of(folder)
    with opened(folder, plan.longest) as completer:
        bench = Bench(completer, Journal(journal, {"identity": identity, "seed": seed}), silent)
        return {"release": str(folder), "identity": identity} | score_with(bench, data, plan, suites, seed)


def score_with(
    bench: Bench, data: Path | None, plan: Plan, suites: Sequence[str] = SUITES, seed: int = 0
) -> dict[str, Any]:
    """The same for any completer; arguments as for `score`."""
    if unknown := set(suites) - set(SUITES):
        raise InputError(f"no suite is called {', '.join(sorted(unknown))}: use {', '.join(SUITES)}")
    if "bits" in suites and data is None:
        raise InputError("bits per byte need the held-out text: give the data folder, or leave out the suite bits")
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for suite in suites:
        began = time.monotonic()
        results[suite] = _suite(suite, bench, data, plan, seed)
        seconds[suite] = round(time.monotonic() - began, 1)
    return {"seed": seed, "plan": asdict(plan), "seconds": seconds, "suites": results}


def _suite(suite: str, bench: Bench, data: Path | None, plan: Plan, seed: int) -> dict[str, Any]:
    if suite == "retrieval":
        return score_retrieval(bench, plan, _filler(data), seed)
    if suite == "tools":
        return score_tools(bench, plan, seed)
    if suite == "arithmetic":
        return score_arithmetic(bench, plan, seed)
    if suite == "chat":
        return score_chat(bench, plan, _prose(data) if data is not None else (), seed)
    if suite == "copying":
        return score_copying(bench, plan, seed)
    assert data is not None  # as `score_with` has checked
    return {kind: score_bits(bench, plan, kind, read_corpus(data / "corpus", kind, held_out=True)) for kind in KINDS}


def _prose(data: Path) -> Iterator[str]:
    return chain.from_iterable(read_corpus(data / "corpus", "prose", held_out=part) for part in (True, False))


def _filler(data: Path | None) -> Callable[[int], Sequence[str]]:
    """Held-out sentences; a longer text than they can fill takes those of training too, but no facts of it."""

    @cache
    def sentences(also_training: bool) -> list[str]:
        if data is None:
            return []
        texts = _prose(data) if also_training else read_corpus(data / "corpus", "prose", held_out=True)
        return [sentence for text in texts for sentence in sentences_of(text)]

    return lambda length: sentences(length > HELD_OUT_FILLER)


@contextmanager
def opened(folder: Path | str, longest: int) -> Iterator[LocalCompleter]:
    """A release in our engine, with memory for one text of this length and many short ones beside it.

    Args:
        folder: the release.
        longest: tokens of the longest text.
    Raises:
        CheckpointError, ConfigError: the release is wrong.
    """
    release = Release(folder)
    tokenizer = Tokenizer(folder)
    model = load_model(release, keep_stored=native() is not None)
    empty = model.new_memory(pages=0, slots=0)
    pages = empty.pages_for(longest) + AT_ONCE * empty.pages_for(SHORT)
    completer = LocalCompleter(
        Engine(
            model,
            budget=pages * empty.page_bytes + SLOTS * empty.slot_bytes,
            prefix=lambda memory: PrefixCache(memory, identity_of(folder)),
            grammars=lambda: GrammarCompiler(
                Path(folder) / "tokenizer.json", model.config.vocab_size, tokenizer.special(EOS)
            ),
            token_bytes=tokenizer.token_bytes,
        ),
        tokenizer,
        Path(folder).name,
    )
    try:
        yield completer
    finally:
        completer.close()
