"""Where sequences stand in a packed batch: tokens of all sequences lie one after another, without padding.

Padding would be pooled into compressed blocks and would shift their borders (architecture.md 2.9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Rows of one or more sequences in lockstep.

    Attributes:
        first: their first row in the packed [T, ...] tensors.
        batch: sequences.
        length: tokens of each.
        start: position of the first of these tokens in its sequence.
    """

    first: int
    batch: int
    length: int
    start: int

    @property
    def rows(self) -> slice:
        """The rows of the packed tensors."""
        return slice(self.first, self.first + self.batch * self.length)

    def take(self, x_T: Tensor) -> Tensor:
        """The rows of x [T, ...] as [B, S, ...]."""
        return x_T[self.rows].unflatten(0, (self.batch, self.length))


def spans_of(shapes: Sequence[tuple[int, int, int]]) -> list[Span]:
    """Spans for (batch, length, start) triples that lie one after another."""
    spans, first = [], 0
    for batch, length, start in shapes:
        spans.append(Span(first, batch, length, start))
        first += batch * length
    return spans


def positions(spans: Sequence[Span], device: torch.device) -> Tensor:
    """The position of every packed token in its sequence, [T]."""
    parts = [torch.arange(s.start, s.start + s.length, device=device).repeat(s.batch) for s in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
