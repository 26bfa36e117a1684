"""Generate tokens with a model that lies in memory: prefill in chunks, then one token after another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from abyssal.base.errors import InputError, TokenError
from abyssal.base.progress import Progress
from abyssal.engine.sampler import Sampler, Sampling
from abyssal.model import Transformer

PREFILL_CHUNK = 1024  # tokens of a prompt that pass at once


@dataclass
class Completion:
    """What a request gave, and what it cost; filled while tokens arrive.

    Attributes:
        tokens: generated ids, the stop token among them.
        logprobs: their log-probabilities under the model.
        finish_reason: "stop" after a stop token, "length" at a limit; None while it runs.
        prefill_s, decode_s: seconds spent on the prompt and on the tokens after the first.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Speed of the prompt."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed after the first token; 0 if there was only one."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s else 0.0


class Engine:
    """One request at a time over one model."""

    def __init__(self, model: Transformer):
        self.model = model

    def start(
        self, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None, stop: Sequence[int] = ()
    ) -> tuple[Completion, Iterator[int]]:
        """Check a request and return its record and the iterator that generates its tokens.

        Args:
            prompt: token ids.
            max_tokens: most tokens to generate; cut to what the context leaves.
            stop: ids that end the answer.
        Raises:
            TokenError: the prompt is empty, too long, or has ids outside the vocabulary.
            InputError: `max_tokens` is not positive.
        """
        limit = self.model.config.max_position_embeddings
        if not prompt:
            raise TokenError("the prompt is empty: give at least one token")
        if len(prompt) >= limit:
            raise TokenError(f"the prompt has {len(prompt)} tokens, the context holds {limit}: shorten it")
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}: give at least 1")
        bad = next((t for t in prompt if not 0 <= t < self.model.config.vocab_size), None)
        if bad is not None:
            top = self.model.config.vocab_size - 1
            raise TokenError(f"token id {bad} is outside the vocabulary: use 0..{top}")
        record = Completion(len(prompt))
        count = min(max_tokens, limit - len(prompt))
        return record, self._tokens(record, prompt, count, Sampler(sampling or Sampling()), frozenset(stop))

    def _tokens(
        self, record: Completion, prompt: Sequence[int], count: int, sampler: Sampler, stop: frozenset[int]
    ) -> Iterator[int]:
        cache = self.model.new_cache()
        begin = time.monotonic()
        ids = torch.tensor(prompt, dtype=torch.long)
        with torch.inference_mode(), Progress(len(prompt), "tokens", "reading the prompt") as progress:
            for part in ids.split(PREFILL_CHUNK):
                z_TD = self.model.run(part, [cache]).z_TD[-1]
                progress.advance(len(part))
        record.prefill_s = time.monotonic() - begin
        while True:
            with torch.inference_mode():  # left at every yield: the caller's code is not ours to mark
                token, logprob = sampler.draw(self.model.logits(z_TD))
            record.tokens.append(token)
            record.logprobs.append(logprob)
            if token in stop or len(record.tokens) == count:
                record.finish_reason = "stop" if token in stop else "length"
            yield token
            if record.finish_reason is not None:
                return
            begin = time.monotonic()
            with torch.inference_mode():
                z_TD = self.model.run(torch.tensor([token]), [cache]).z_TD[-1]
            record.decode_s += time.monotonic() - begin
