"""attention: one shared head of entries that are key and value at once, with a sink (architecture.md 2.4).

Each query reads window entries, which a mask limits, and either a masked set of compressed entries that
all queries share or compressed entries gathered for it alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.quant.precision import wide


def _with_sink(logits_BQHK: Tensor, sink_H: Tensor) -> Tensor:
    """Softmax whose denominator also holds exp(sink); the sink's own share is dropped."""
    sink = wide(sink_H).view(1, 1, -1, 1).expand(*logits_BQHK.shape[:-1], 1)
    return torch.cat([logits_BQHK, sink], dim=-1).softmax(dim=-1)[..., :-1]


def attend(q_BQHC: Tensor, entries_BKC: Tensor, mask: Tensor | None, sink_H: Tensor, scale: float) -> Tensor:
    """Attention over entries that all queries of a sequence share.

    Args:
        q_BQHC: queries, any float dtype; products accumulate in float32 (float64 for float64).
        entries_BKC: keys, which are also the values.
        mask: True where a query may read an entry, broadcastable to [B, Q, K]; None for everywhere.
        sink_H: raw logits that only enlarge the denominator.
        scale: factor of the products, head_dim ** -0.5.
    Returns:
        o_BQHC in the dtype of q.
    """
    batch, queries, heads, _ = q_BQHC.shape
    entries = wide(entries_BKC)
    logits = torch.matmul(wide(q_BQHC).flatten(1, 2) * scale, entries.transpose(1, 2))
    logits_BQHK = logits.view(batch, queries, heads, -1)
    if mask is not None:
        logits_BQHK = logits_BQHK.masked_fill(~mask.unsqueeze(-2), float("-inf"))
    weights = _with_sink(logits_BQHK, sink_H).flatten(1, 2)
    return torch.matmul(weights, entries).view(q_BQHC.shape).to(q_BQHC.dtype)


def attend_gathered(
    q_BQHC: Tensor,
    entries_BKC: Tensor,
    mask: Tensor,
    chosen_BQTC: Tensor,
    chosen_mask_BQT: Tensor,
    sink_H: Tensor,
    scale: float,
) -> Tensor:
    """Attention over shared entries and, beside them, entries gathered for each query alone.

    Args:
        q_BQHC, entries_BKC, mask, sink_H, scale: as in `attend`.
        chosen_BQTC: T more entries for each query.
        chosen_mask_BQT: False at places that hold no entry.
    """
    batch, queries, heads, _ = q_BQHC.shape
    entries, chosen = wide(entries_BKC), wide(chosen_BQTC)
    q = wide(q_BQHC) * scale
    near = torch.matmul(q.flatten(1, 2), entries.transpose(1, 2)).view(batch, queries, heads, -1)
    far = torch.matmul(q, chosen.transpose(2, 3))
    near = near.masked_fill(~mask.unsqueeze(-2), float("-inf"))
    far = far.masked_fill(~chosen_mask_BQT.unsqueeze(-2), float("-inf"))
    weights = _with_sink(torch.cat([near, far], dim=-1), sink_H)
    near_w, far_w = weights.split([entries.shape[1], chosen.shape[2]], dim=-1)
    out = torch.matmul(near_w.flatten(1, 2), entries).view(q.shape) + torch.matmul(far_w, chosen)
    return out.to(q_BQHC.dtype)
