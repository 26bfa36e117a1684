"""How well an indexer finds what attention reads, and how much attention rests on the sink (training.md 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from abyssal.model.recorder import Attended
from abyssal.train.losses import attention_shares, index_scores

QUERIES = 64  # of a layer that are looked at: the last ones of its longest sequence


@dataclass
class Gauges:
    """Sums over layers and queries; a mean is None where nothing was counted.

    Attributes:
        ratio: tokens of a block.
        topk: blocks that a query reads once selection is sparse.
        found, sought: blocks.
        sink: mass, of `heads` softmaxes.
    """

    ratio: int
    topk: int
    found: float = 0.0
    sought: float = 0.0
    sink: float = 0.0
    heads: float = 0.0

    @torch.no_grad()
    def add(self, seen: Attended) -> None:
        """Look at some queries of a layer."""
        first, length, number = _longest(seen)
        count = min(QUERIES, length)
        part = slice(first + length - count, first + length)
        visible_Q = torch.arange(length - count + 1, length + 1) // self.ratio
        blocks = int(visible_Q[-1])
        if not blocks:
            return
        entries, keys = seen.blocks_GBC[number, :blocks], seen.keys_GBJ[number, :blocks]
        visible_QB = torch.arange(blocks) < visible_Q.unsqueeze(1)
        shares_QB, sink_QH = attention_shares(seen, part, entries, visible_QB)
        self.sink += float(sink_QH.sum())
        self.heads += sink_QH.numel()
        choosing_Q = visible_Q > self.topk
        if not choosing_Q.any():
            return
        scores_QB = index_scores(seen.index_q_TIJ[part], seen.index_weights_TI[part], keys)
        chosen, best = (
            torch.zeros_like(visible_QB).scatter_(1, by_QB.topk(self.topk).indices, True)
            for by_QB in (scores_QB.masked_fill(~visible_QB, -torch.inf), shares_QB)
        )
        self.found += float((chosen & best)[choosing_Q].sum())
        self.sought += self.topk * int(choosing_Q.sum())

    @property
    def recall(self) -> float | None:
        """Share of the blocks with most attention that the index scores put among the first `topk`."""
        return self.found / self.sought if self.sought else None

    @property
    def sink_mass(self) -> float | None:
        """Mean share of a head's softmax that the sink takes."""
        return self.sink / self.heads if self.heads else None


def _longest(seen: Attended) -> tuple[int, int, int]:
    """First row, length and number of the longest sequence."""
    found, number = (0, 0, 0), 0
    for first, length, count in seen.groups:
        if length > found[1]:
            found = (first, length, number)
        number += count
    return found
