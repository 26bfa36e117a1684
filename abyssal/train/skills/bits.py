"""Bits per byte of held-out text: comparable across tokenizers, since it counts bytes (training.md 7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from abyssal.base.errors import DataError, RunError
from abyssal.chat.api import Completion, PromptUse
from abyssal.encoding.literals import BOS
from abyssal.encoding.tokenizer import Piece
from abyssal.train.skills.asking import GREEDY, Bench
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.rates import Row


@dataclass(frozen=True)
class Part:
    """A stretch of a document, read behind the mark of a document's beginning."""

    id: str
    text: str


def score_bits(bench: Bench, plan: Plan, kind: str, documents: Iterable[str]) -> dict[str, Any]:
    """-log2 p of all bytes over their number; each part of a document is read alone.

    Args:
        bench: model and journal.
        plan: bytes of a part, and how many parts.
        kind: name of what is read, "prose" or "code".
        documents: its texts.
    Raises:
        DataError: there is no text.
    """
    parts = list(cut(kind, documents, plan.part))
    if not parts:
        raise DataError(f"there is no held-out {kind} to read: build the corpus again")
    if plan.parts is not None and plan.parts < len(parts):
        parts = [parts[i * len(parts) // plan.parts] for i in range(plan.parts)]
    rows = bench.rows(f"bits per byte of {kind}", parts, partial(_read, bench))
    size, tokens = sum(row["bytes"] for row in rows), sum(row["tokens"] for row in rows)
    bits = math.fsum(row["bits"] for row in rows)
    return {"bits_per_byte": bits / size, "bytes": size, "tokens": tokens, "parts": len(rows), "part": plan.part}


def cut(kind: str, documents: Iterable[str], size: int) -> Iterator[Part]:
    """Documents in parts of at most so many bytes, and no character in two of them."""
    for number, text in enumerate(documents):
        data = text.encode()
        begin = 0
        while begin < len(data):
            end = min(begin + size, len(data))
            while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            yield Part(f"bits/{kind}/{size}/{number}/{begin}", data[begin:end].decode())
            begin = end


async def _read(bench: Bench, part: Part) -> Row:
    prompt = [Piece(BOS, special=True), Piece(part.text)]
    completion = Completion(prompt=prompt, max_tokens=1, sampling=GREEDY, top_logprobs=0, score_prompt=True)
    async with aclosing(bench.completer.complete(completion)) as stream:  # type: ignore[type-var]
        async for event in stream:
            if isinstance(event, PromptUse):
                scores = event.scores[1:]  # nothing stands before the first
                bits = -math.fsum(score.logprob for score in scores if score is not None) / math.log(2)
                return {"bytes": len(part.text.encode()), "tokens": len(scores), "bits": bits}
    raise RunError(f"the engine did not read {part.id}: score again")
