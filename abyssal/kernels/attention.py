"""attention: one shared head of entries that are key and value at once, with a sink (architecture.md 2.4).

Keys come in parts: those gathered for each query, and tiles that all queries of a sequence share. The softmax
runs over the parts in order, so that a part which a query cannot see changes nothing, not even a bit, and the
result for a query does not depend on the queries beside it.

The native kernel reads rows where they lie and takes a query from its projection to its turned-back result. A
query's entries are one list, its window oldest first and then its blocks in rising order, cut into tiles of 64 and
segments of 16 tiles; so the order of its sums, another one than the reference's, depends on its position alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.choice import learning, native
from abyssal.quant.precision import wide


class Attention:
    """Queries and what they have read so far.

    Args:
        q_QHC: queries, at least two (a batch of one takes another path); products accumulate in float32
            (float64 for float64).
        keys_QKC: entries of each query.
        mask_QK: True where a query may read an entry.
        sink_H: raw logits that only enlarge the denominator.
        scale: factor of the products, head_dim ** -0.5.
    """

    def __init__(self, q_QHC: Tensor, keys_QKC: Tensor, mask_QK: Tensor, sink_H: Tensor, scale: float):
        self.dtype = q_QHC.dtype
        self.q_QHC = wide(q_QHC) * scale
        keys, sink = wide(keys_QKC), wide(sink_H)
        logits_QHK = torch.bmm(self.q_QHC, keys.transpose(1, 2)).masked_fill(~mask_QK.unsqueeze(1), float("-inf"))
        self.largest_QH = torch.maximum(logits_QHK.detach().amax(-1), sink.detach())
        weights_QHK = (logits_QHK - self.largest_QH.unsqueeze(-1)).exp()
        self.total_QH = weights_QHK.sum(-1) + (sink - self.largest_QH).exp()
        self.out_QHC = torch.bmm(weights_QHK, keys)

    def read(self, keys_GKC: Tensor, mask_GSK: Tensor) -> None:
        """Read a tile that the S = Q / G queries of each sequence share.

        Args:
            keys_GKC: entries of each of G sequences; S * H must be a multiple of `linear.row_unit`
                for equal bits.
            mask_GSK: True where a query may read an entry.
        """
        G, S, K = mask_GSK.shape
        H, C = self.q_QHC.shape[1:]
        keys = wide(keys_GKC)
        logits = torch.matmul(self.q_QHC.reshape(G, S * H, C), keys.transpose(1, 2)).view(G, S, H, K)
        logits = logits.masked_fill(~mask_GSK.unsqueeze(2), float("-inf"))
        before_GSH = self.largest_QH.view(G, S, H)
        largest_GSH = torch.maximum(logits.detach().amax(-1), before_GSH)
        weights = (logits - largest_GSH.unsqueeze(-1)).exp()
        fade_QH = (before_GSH - largest_GSH).exp().view(G * S, H)
        read = torch.matmul(weights.view(G, S * H, K), keys).view(G * S, H, C)
        self.total_QH = self.total_QH * fade_QH + weights.sum(-1).view(G * S, H)
        self.out_QHC = self.out_QHC * fade_QH.unsqueeze(-1) + read
        self.largest_QH = largest_GSH.view(G * S, H)

    def result(self) -> Tensor:
        """o_QHC in the dtype of the queries."""
        return (self.out_QHC / self.total_QH.unsqueeze(-1)).to(self.dtype)


def attend_reference(q_QHC: Tensor, keys_KC: Tensor, mask_QK: Tensor, sink_H: Tensor, scale: float) -> Tensor:
    """The plain meaning: one softmax over all entries and the sink, whose own share is dropped."""
    logits_QHK = torch.einsum("qhc,kc->qhk", q_QHC, keys_KC) * scale
    logits_QHK = logits_QHK.masked_fill(~mask_QK.unsqueeze(1), float("-inf"))
    sink = sink_H.view(1, -1, 1).expand(len(q_QHC), -1, 1)
    weights = torch.cat([logits_QHK, sink], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("qhk,kc->qhc", weights, keys_KC)


@dataclass(frozen=True)
class Window:
    """The window entries that a pass reads and adds, as they are stored.

    Attributes:
        spans: [G, 6] of each sequence: its first row in the pass, its tokens, the position of the first, the first
            position whose ring rows are present, its slot, and up to where blocks are stored already.
        fresh: entries of the pass's own tokens, [T, width].
        ring: position p of slot s lies in row s * ring_size + p % ring_size.
        ring_size: places of a slot, `window` or more.
        window: entries that a query reads, its own among them.
    """

    spans: Tensor
    fresh: Tensor
    ring: Tensor
    ring_size: int
    window: int


@dataclass(frozen=True)
class Blocks:
    """The compressed entries that a pass reads.

    Attributes:
        ratio: tokens of a block; 0 for no blocks.
        entries: block b of a sequence lies in row 1 + page * per_page + b % per_page.
        tables: [G, P] page numbers of each sequence; page b // per_page holds block b.
        per_page: blocks of a page.
        chosen: [T, K] blocks that each token reads in rising order, -1 in unused places; None for all that it sees.
    """

    ratio: int
    entries: Tensor | None
    tables: Tensor | None
    per_page: int
    chosen: Tensor | None


def fast(*tensors: Tensor) -> ModuleType | None:
    """The native kernels, if they can take these: float32 or packed, on the CPU."""
    module = native()
    if module is None or any(x.dtype not in (torch.float32, torch.uint8) or not x.is_cpu for x in tensors):
        return None
    return module


Numbers = tuple[float, float, int, int, int, int]  # eps, scale, window, ring_size, ratio, per_page


def _arguments(
    numbers: Numbers,
    turn_TR: Tensor,
    spans: Tensor,
    tables: Tensor | None,
    chosen: Tensor | None,
    q_THC: Tensor,
    sink_H: Tensor,
    fresh: Tensor,
    ring: Tensor,
    entries: Tensor | None,
) -> tuple[Any, ...]:
    eps, scale, window, ring_size, ratio, per_page = numbers
    turn = torch.view_as_real(turn_TR)
    near = (spans, fresh, ring, window, ring_size)
    return (q_THC, turn, sink_H, eps, scale, *near, ratio, entries, tables, per_page, chosen)


class _Attend(torch.autograd.Function):
    """Attention where a gradient is needed; the softmax is computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        module: ModuleType,
        numbers: Numbers,
        turn_TR: Tensor,
        spans: Tensor,
        tables: Tensor | None,
        chosen: Tensor | None,
        *read: Tensor | None,
    ) -> Tensor:
        assert read[0] is not None
        out = torch.empty_like(read[0])
        ctx.module, ctx.numbers = module, numbers
        ctx.save_for_backward(out, turn_TR, spans, tables, chosen, *read)
        module.attend(*_arguments(numbers, turn_TR, spans, tables, chosen, *read), out, False)  # type: ignore[arg-type]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in saved[4:]]
        ctx.module.attend_backward(*_arguments(ctx.numbers, *saved), out, dout.contiguous(), *grads)
        return None, None, None, None, None, None, *grads


def attend(
    module: ModuleType,
    q_THC: Tensor,
    turn_TR: Tensor,
    sink_H: Tensor,
    eps: float,
    window: Window,
    blocks: Blocks | None,
    kept: bool = True,
) -> Tensor:
    """All of attention between the projections.

    Gradients flow to queries, sink, fresh and ring entries, and blocks, unless `kept`. They want float32 entries, and
    no page that two sequences share.

    Args:
        module: the native kernels.
        q_THC: queries as projected; each head is normalised (without a weight) and turned here.
        turn_TR: complex rotations of the tokens' positions.
        sink_H: raw logits that only enlarge the denominator.
        eps: of the normalisation.
        window, blocks: what the queries read; softmax scale is C ** -0.5.
        kept: add the window entries to the ring.
    Returns:
        o_THC, turned back by the position of the query; zeros in rows that belong to no span.
    """
    far = blocks or Blocks(0, None, None, 1, None)
    numbers = eps, q_THC.shape[-1] ** -0.5, window.window, window.ring_size, far.ratio, far.per_page
    plans = numbers, turn_TR, window.spans, far.tables, far.chosen
    read = q_THC, sink_H, window.fresh, window.ring, far.entries
    if not kept and learning(*read):
        read = tuple(x if x is None else x.contiguous() for x in read)  # type: ignore[assignment]
        return _Attend.apply(module, *plans, *read)  # type: ignore[no-untyped-call]
    out = torch.empty_like(q_THC)
    module.attend(*_arguments(*plans, *read), out, kept)
    return out
