"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together have this probability.
        seed: equal seeds give equal tokens; None draws a new one.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature is {self.temperature}: use 0 to 100")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: use more than 0, at most 1")


class Sampler:
    """Draws tokens of one request."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits_V: Tensor) -> tuple[int, float]:
        """A token and its log-probability under the model, before temperature and truncation."""
        s = self.sampling
        logprobs = logits_V.double().log_softmax(-1)
        if s.temperature == 0:
            token = int(logprobs.argmax())
        else:
            probabilities = (logprobs / s.temperature).softmax(-1)
            if s.top_p < 1:
                ordered, order = probabilities.sort(descending=True, stable=True)
                kept = ordered.cumsum(-1) - ordered < s.top_p  # the token that crosses the border stays
                probabilities = torch.zeros_like(probabilities).scatter(0, order[kept], ordered[kept])
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return token, float(logprobs[token])
