"""The losses of pre-training, as functions of what a pass gives (training.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from abyssal.kernels.linear import linear
from abyssal.kernels.router import sqrt_softplus
from abyssal.model.recorder import Attended
from abyssal.quant.precision import wide

ROWS = 1024  # rows of logits that live at once
QUERIES = 512  # queries whose attention is computed again at once
SPARSE = 4  # gathered products run several times slower than shared ones


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy behind the head; the gradients are made beside it, so no logits are kept or made twice."""

    @staticmethod
    def forward(ctx: Any, z_TD: Tensor, head_VD: Tensor, targets_T: Tensor, weights_T: Tensor, rows: int) -> Tensor:
        learning = any(ctx.needs_input_grad[:2])
        dz_TD = torch.zeros_like(z_TD) if learning else None
        dhead_VD = torch.zeros_like(head_VD) if learning else None
        total = z_TD.new_zeros(())
        for first in range(0, len(z_TD), rows):
            part = slice(first, first + rows)
            z, targets, weights = z_TD[part], targets_T[part], weights_T[part]
            logs_TV = linear(z, head_VD).log_softmax(-1)
            total -= (logs_TV.gather(1, targets.unsqueeze(1)).squeeze(1) * weights).sum()
            if dz_TD is not None and dhead_VD is not None:
                slope_TV = logs_TV.exp_()
                slope_TV[torch.arange(len(z)), targets] -= 1
                slope_TV *= weights.unsqueeze(1)
                torch.mm(slope_TV, head_VD, out=dz_TD[part])
                dhead_VD.addmm_(slope_TV.T, z)
        ctx.save_for_backward(dz_TD, dhead_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dz_TD, dhead_VD = ctx.saved_tensors
        return grad * dz_TD, grad * dhead_VD, None, None, None


def cross_entropy(z_TD: Tensor, head_VD: Tensor, targets_T: Tensor, weights_T: Tensor, rows: int = ROWS) -> Tensor:
    """Sum over tokens of weight times -log p(target), in float32 (float64 for float64).

    Args:
        z_TD: what the head reads.
        head_VD: its weight.
        targets_T: token ids; one whose weight is 0 is not looked at.
        weights_T: 1 / (target tokens of the global batch) for a target, 0 elsewhere: a mean of means never arises.
        rows: rows of logits that live at once; changes the rounding of the head's gradient alone.
    """
    taken = weights_T.nonzero().squeeze(1)
    z = wide(z_TD)
    if len(taken) < len(z):
        z, targets_T, weights_T = z.index_select(0, taken), targets_T[taken], weights_T[taken]
    return _HeadLoss.apply(z, wide(head_VD), targets_T, weights_T.to(z.dtype), rows)  # type: ignore[no-untyped-call]


def balance_loss(logits_TE: Tensor, chosen_TK: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum over sequences of sum_e f_e P_e; 1 for a sequence whose experts have equal shares and loads.

    Args:
        logits_TE: router logits.
        chosen_TK: the chosen experts, which take no gradient.
        lengths: tokens of each sequence, one behind the other.
    """
    E, K = logits_TE.shape[1], chosen_TK.shape[1]
    scores_TE = sqrt_softplus(wide(logits_TE))
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    hits_TE = torch.zeros_like(shares_TE).scatter_(1, chosen_TK, 1.0)
    of_T = torch.repeat_interleave(torch.tensor(lengths))
    counts_S1 = torch.tensor(lengths, dtype=shares_TE.dtype).unsqueeze(1)
    zeros_SE = shares_TE.new_zeros(len(lengths), E)
    loads_SE = zeros_SE.index_add(0, of_T, hits_TE) * (E / K) / counts_S1
    means_SE = zeros_SE.index_add(0, of_T, shares_TE) / counts_S1
    return (loads_SE * means_SE).sum()


def attention_shares(seen: Attended, part: slice, entries: Tensor, read_QB: Tensor) -> tuple[Tensor, Tensor]:
    """How the queries of a layer spread over blocks, and over the sink.

    Args:
        seen: what the layer read.
        part: rows of neighbouring queries of one sequence.
        entries: blocks that all of them may read [B, C], or some for each [Q, B, C]; all that they read among them.
        read_QB: which of these they read.
    Returns:
        shares of the blocks, summed over heads, [Q, B], summing to 1; the sink's of each head, [Q, H].
    """
    q_QHC = wide(seen.q_THC[part]) * seen.scale
    near_QWC = wide(seen.near_KC)[seen.index_TW[part]]
    near_QHW = torch.einsum("qhc,qwc->qhw", q_QHC, near_QWC)
    near_QHW = near_QHW.masked_fill(~seen.mask_TW[part].unsqueeze(1), float("-inf"))
    far_QHB = torch.matmul(q_QHC, wide(entries).mT).masked_fill(~read_QB.unsqueeze(1), float("-inf"))
    sink_QH1 = wide(seen.sink_H).expand(len(q_QHC), -1).unsqueeze(-1)
    shares_QHA = torch.cat([far_QHB, near_QHW, sink_QH1], dim=-1).softmax(-1)
    shares_QB = shares_QHA[..., : far_QHB.shape[-1]].sum(1)
    tiny = torch.finfo(shares_QB.dtype).tiny
    return shares_QB / shares_QB.sum(-1, keepdim=True).clamp(min=tiny), shares_QHA[..., -1]


def index_scores(q_QIJ: Tensor, weights_QI: Tensor, keys: Tensor) -> Tensor:
    """The indexer's scores of blocks, [Q, B], with gradients: sum over heads of weight times relu(q . k).

    Args:
        q_QIJ, weights_QI: index queries and head weights.
        keys: of blocks for all of them [B, J], or of some for each [Q, B, J].
    """
    return torch.einsum("qi,qib->qb", weights_QI, torch.matmul(q_QIJ, keys.mT).relu())


def _divergence(
    seen: Attended, part: slice, q_QIJ: Tensor, weights_QI: Tensor, keys_BJ: Tensor, sequence: int, sparse: int
) -> Tensor:
    """`index_loss` of neighbouring queries of one sequence; `keys_BJ` are those of the blocks up to their last."""
    blocks = len(keys_BJ)
    read_QB = seen.read_TB[part, :blocks]
    entries, keys = seen.blocks_GBC[sequence, :blocks], keys_BJ
    most = int(read_QB.sum(1).max())
    if sparse * most < blocks:
        some_QB = read_QB.float().topk(most).indices.sort().values
        entries = entries[some_QB]
        keys = keys.index_select(0, some_QB.flatten()).unflatten(0, some_QB.shape)
        read_QB = read_QB.gather(1, some_QB)
    with torch.no_grad():
        target_QB, _ = attention_shares(seen, part, entries, read_QB)
    scores_QB = index_scores(q_QIJ, weights_QI, keys)
    # a finite number for what is not read: rows that read nothing keep a gradient of zero, not NaN
    hidden = torch.finfo(scores_QB.dtype).min / 4
    logs_QB = F.log_softmax(scores_QB.masked_fill(~read_QB, hidden), dim=-1)
    return (torch.xlogy(target_QB, target_QB) - target_QB * logs_QB).masked_fill(~read_QB, 0).sum()


def index_loss(seen: Attended, queries: int = QUERIES, sparse: int = SPARSE, recompute: bool = False) -> Tensor:
    """Sum over queries of KL(attention of the layer over the blocks it reads || softmax of the index scores).

    Gradients reach the indexer alone. Queries that read no block are skipped; with a sparse selection both sides
    are restricted to the chosen set.

    Args:
        seen: what a CSA layer read.
        queries: of one step, to bound memory; changes no term of the sum.
        sparse: where a query sees more than so many times what it reads, the blocks are gathered for each; nor
            does this change a term.
        recompute: run each step again on the way back, so that scores of one step live at once; changes no bit.
    """
    lengths = [length for _, length, count in seen.groups for _ in range(count)]
    sizes = [min(queries, length - start) for length in lengths for start in range(0, length, queries)]
    sequences = [number for number, length in enumerate(lengths) for _ in range(0, length, queries)]
    # cut once: the way back of each slice alone would fill a whole tensor with zeros
    q, weights, keys_of = seen.index_q_TIJ.split(sizes), seen.index_weights_TI.split(sizes), seen.keys_GBJ.unbind()
    total, first = seen.index_q_TIJ.new_zeros(()), 0
    for number, (size, sequence) in enumerate(zip(sizes, sequences, strict=True)):
        part = slice(first, first + size)
        first += size
        read_B = seen.read_TB[part].any(0).nonzero()
        if not len(read_B):
            continue
        keys = keys_of[sequence][: int(read_B[-1]) + 1]
        step = seen, part, q[number], weights[number], keys, sequence, sparse
        if recompute:
            total = total + checkpoint(_divergence, *step, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _divergence(*step)
    return total


def reading_queries(lengths: Sequence[int], ratio: int) -> int:
    """How many tokens of new sequences see a block of so many tokens: over these `index_loss` is a mean."""
    return sum(max(length - ratio + 1, 0) for length in lengths)
