"""Attention of the three kinds: window only, CSA and HCA (paper 2.3, architecture.md 2.4 and 2.8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels.attention import attend, attend_gathered
from abyssal.kernels.index_topk import indices_of
from abyssal.kernels.rms_norm import rms_norm
from abyssal.kernels.rotary import rotate_tail
from abyssal.kvcache.sequence import LayerCache
from abyssal.model.compressor import Compressor
from abyssal.model.indexer import Indexer
from abyssal.model.linear import GroupedLinear, QuantLinear
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope
from abyssal.model.span import Span
from abyssal.quant.numerics import Numerics

TILE_SCORES = 1 << 22  # scores of one tile of queries, over all heads: 16 MiB of float32
GATHER_FROM = 4  # gather chosen entries once there are this many times more visible ones


class Attention(nn.Module):
    """Many query heads over one shared key-value head, window and compressed entries side by side.

    Args:
        config: the model's numbers.
        ratio: 0 window only, 4 CSA, 128 HCA.
        numerics: which roundings are simulated.
    """

    def __init__(self, config: ModelConfig, ratio: int, numerics: Numerics):
        super().__init__()
        self.config = config
        self.ratio = ratio
        D, H, C, Q = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
        self.attn_sink = nn.Parameter(torch.zeros(H))
        self.wq_a = QuantLinear(D, Q, numerics)
        self.q_norm = RMSNorm(Q, config.rms_norm_eps)
        self.wq_b = QuantLinear(Q, H * C, numerics)
        self.wkv = QuantLinear(D, C, numerics)
        self.kv_norm = RMSNorm(C, config.rms_norm_eps)
        G, O = config.o_groups, config.o_lora_rank
        self.wo_a = GroupedLinear(H * C // G, G * O, G)
        self.wo_b = QuantLinear(G * O, D, numerics)
        self.compressor = Compressor(config, ratio, C) if ratio else None
        self.indexer = Indexer(config, ratio, numerics) if ratio == 4 else None

    def forward(
        self, x_TD: Tensor, spans: Sequence[Span], caches: Sequence[LayerCache], rope: Rope, turn_T: Tensor
    ) -> Tensor:
        """Attend and project back.

        Args:
            x_TD: normed input, packed.
            spans: where the sequences stand in it.
            caches: this layer's state of each span; advanced by the span's tokens.
            rope: the layer's rotations, which compressed entries need at places of their own.
            turn_T: those of the tokens, `rope.over(spans)`.
        Returns:
            y_TD.
        """
        H, C = self.config.num_attention_heads, self.config.head_dim
        latent_TQ = self.q_norm(self.wq_a(x_TD))
        q_THC = self.wq_b(latent_TQ).unflatten(-1, (H, C))
        q_THC = rotate_tail(rms_norm(q_THC, None, self.config.rms_norm_eps), turn_T.unsqueeze(1))
        kv_TC = rotate_tail(self.kv_norm(self.wkv(x_TD)), turn_T)
        mixed = []
        for span, cache in zip(spans, caches, strict=True):
            index = None
            x_BSD = span.take(x_TD)
            if self.indexer is not None and cache.index is not None:
                # first: a query sees the block that its own token completes
                self.indexer.remember(x_BSD, span.start, cache.index, rope)
                if cache.index.store.length > self.config.index_topk:
                    turn = span.take(turn_T).unsqueeze(2)
                    index = self.indexer.queries(span.take(latent_TQ), x_BSD, turn)
            window_BKC = cache.window.extend(span.take(kv_TC))
            if self.compressor is not None and cache.compressed is not None:
                entries = self.compressor(x_BSD, span.start, cache.compressed.tail, rope)
                if entries is not None:
                    cache.compressed.store.append(entries)
            mixed.append(self._core(span.take(q_THC), window_BKC, index, span.start, cache).flatten(0, 1))
        o_THC = rotate_tail(_joined(mixed), turn_T.conj().unsqueeze(1))
        return self.wo_b(self.wo_a(o_THC.unflatten(1, (self.config.o_groups, -1)).flatten(2)))

    def _core(
        self,
        q_BSHC: Tensor,
        window_BKC: Tensor,
        index: tuple[Tensor, Tensor] | None,
        start: int,
        cache: LayerCache,
    ) -> Tensor:
        """Attention of S queries, a tile of queries at a time so that scores stay small."""
        batch, length = q_BSHC.shape[:2]
        H, W = self.config.num_attention_heads, self.config.sliding_window
        before = window_BKC.shape[1] - length  # window entries of earlier calls
        width = W + (cache.compressed.store.length if cache.compressed is not None else 0)
        heads = max(H, self.config.index_n_heads) if index is not None else H
        tile = min(max(TILE_SCORES // (batch * heads * width), 16), max(W, 256))
        out = []
        for first in range(0, length, tile):
            last = min(first + tile, length)
            low = max(before + first - W + 1, 0)
            near = window_BKC[:, low : before + last]
            near_mask = None  # a lone query reads everything that is left of the window
            if last - first > 1:
                queries = torch.arange(before + first, before + last, device=q_BSHC.device).unsqueeze(1)
                keys = torch.arange(low, before + last, device=q_BSHC.device)
                near_mask = (keys <= queries) & (keys > queries - W)
            q = q_BSHC[:, first:last]
            part = None if index is None else (index[0][:, first:last], index[1][:, first:last])
            out.append(self._tile(q, near, near_mask, part, start + first, cache))
        return _joined(out, dim=1)

    def _tile(
        self,
        q_BSHC: Tensor,
        near_BKC: Tensor,
        near_mask: Tensor | None,
        index: tuple[Tensor, Tensor] | None,
        start: int,
        cache: LayerCache,
    ) -> Tensor:
        """Attention of a tile whose first query stands at position `start`."""
        sink, scale = self.attn_sink, self.config.head_dim**-0.5
        length = q_BSHC.shape[1]
        blocks = (start + length) // self.ratio if self.ratio else 0
        if not blocks or cache.compressed is None:
            return attend(q_BSHC, near_BKC, near_mask, sink, scale)
        store = cache.compressed.store
        if near_mask is None:  # a lone query: its entries are keys like those of the window
            if index is not None and self.indexer is not None and cache.index is not None:
                far = store.gather(self.indexer.top(*index, cache.index.store.read(blocks))).squeeze(1)
            else:
                far = store.read(blocks)
            return attend(q_BSHC, torch.cat([near_BKC, far], dim=1), None, sink, scale)
        ends = torch.arange(start + 1, start + 1 + length, device=q_BSHC.device)
        visible_S = ends // self.ratio  # block s is visible once its last token has been read
        if index is not None and self.indexer is not None and cache.index is not None:
            keep = self.indexer.keep(*index, visible_S, cache.index.store.read(blocks))
            k = self.config.index_topk
            if blocks > GATHER_FROM * k and not q_BSHC.requires_grad:
                chosen = indices_of(keep, k)
                far = store.gather(chosen.clamp(min=0))
                return attend_gathered(q_BSHC, near_BKC, near_mask, far, chosen >= 0, sink, scale)
        else:
            keep = (torch.arange(blocks, device=q_BSHC.device) < visible_S.unsqueeze(1)).unsqueeze(0)
        entries = torch.cat([near_BKC, store.read(blocks)], dim=1)
        mask = torch.cat([near_mask.expand(keep.shape[0], *near_mask.shape), keep], dim=-1)
        return attend(q_BSHC, entries, mask, sink, scale)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
