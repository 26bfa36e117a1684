"""index_topk: the lightning indexer's scores and its choice (architecture.md 2.7)."""

from __future__ import annotations

import torch
from torch import Tensor


def index_scores(q_BQIJ: Tensor, weights_BQI: Tensor, keys_BTJ: Tensor) -> Tensor:
    """I[t, s] = sum over heads of w[t, h] * relu(q[t, h] . k[s]).

    Returns:
        scores_BQT in the dtype of the inputs. Weights may be negative; exact zeros are common.
    """
    batch, queries, heads, _ = q_BQIJ.shape
    dots = torch.matmul(q_BQIJ.flatten(1, 2), keys_BTJ.transpose(1, 2)).relu_()
    dots = dots.view(batch, queries, heads, -1)
    return torch.matmul(weights_BQI.unsqueeze(2), dots).squeeze(2)


def choose(scores_BQT: Tensor, visible_Q: Tensor, k: int) -> Tensor:
    """Which blocks each query reads: the k largest visible scores, ties to the lowest block.

    Args:
        scores_BQT: index scores.
        visible_Q: how many blocks, counted from the first, each query may see.
        k: how many blocks a query reads at most.
    Returns:
        keep_BQT: True for the chosen blocks; a query that sees at most k blocks keeps all of them.
    """
    blocks = scores_BQT.shape[-1]
    seen_QT = torch.arange(blocks, device=scores_BQT.device) < visible_Q.unsqueeze(-1)
    if blocks <= k:
        return seen_QT.expand(scores_BQT.shape)
    scores = scores_BQT.masked_fill(~seen_QT, float("-inf"))
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > threshold
    level = (scores == threshold) & seen_QT  # minus infinity ties with itself where few blocks are visible
    room = k - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def top_blocks(scores_BQT: Tensor, k: int) -> Tensor:
    """`indices_of(choose(...))` for queries that see every block: [B, Q, min(k, T)], rising.

    One top-k of k + 1 suffices unless the border is a tie, which the general choice breaks.
    """
    blocks = scores_BQT.shape[-1]
    if blocks <= k:
        return torch.arange(blocks, device=scores_BQT.device).expand(scores_BQT.shape)
    best = scores_BQT.topk(k + 1, dim=-1)
    if bool((best.values[..., k - 1] > best.values[..., k]).all()):
        return best.indices[..., :k].sort(dim=-1).values
    everything = torch.full((scores_BQT.shape[1],), blocks, device=scores_BQT.device)
    return indices_of(choose(scores_BQT, everything, k), k)


def indices_of(keep_BQT: Tensor, k: int) -> Tensor:
    """The chosen block numbers in rising order, [B, Q, k], with -1 in unused places."""
    blocks = keep_BQT.shape[-1]
    numbers = torch.arange(blocks, device=keep_BQT.device).expand(keep_BQT.shape)
    order = numbers.masked_fill(~keep_BQT, blocks)
    first = order.topk(min(k, blocks), dim=-1, largest=False, sorted=True).values
    return first.masked_fill(first == blocks, -1)
