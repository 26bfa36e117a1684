"""Attention of the three kinds: window only, CSA and HCA (paper 2.3, architecture.md 2.4 and 2.8)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels import attention
from abyssal.kernels.rotary import norm_and_rotate, rotate_tail
from abyssal.kvcache.memory import CompressedMemory, LayerMemory
from abyssal.model.batch import Batch, Group
from abyssal.model.compressor import Compressor
from abyssal.model.indexer import Indexer
from abyssal.model.linear import GroupedLinear, QuantLinear
from abyssal.model.norm import RMSNorm
from abyssal.model.recorder import Attended
from abyssal.model.rope import Rope
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide

KEYS_OF_A_STEP = 1 << 21  # values of the entries that are gathered at once: 8 MiB of float32
# HCA's entries are read in tiles, short at first, so that a short context does not pay for empty places
FIRST_TILES = (64, 64, 128, 256)
TILE = 512


def tiles(blocks: int) -> Iterator[tuple[int, int]]:
    """Tiles that cover so many blocks; their borders depend on nothing else, so sums keep their order."""
    first = 0
    for size in chain(FIRST_TILES, repeat(TILE)):
        if first >= blocks:
            return
        yield first, first + size
        first += size


def _look_up(rows_KC: Tensor, index_QW: Tensor) -> Tensor:
    return rows_KC.index_select(0, index_QW.flatten()).unflatten(0, index_QW.shape)


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

    def forward(self, x_TD: Tensor, batch: Batch, memory: LayerMemory, rope: Rope, turn_T: Tensor) -> Tensor:
        """Attend and project back.

        Args:
            x_TD: normed input, packed.
            batch: where the tokens stand.
            memory: this layer's memory; the tokens are added to it.
            rope: the layer's rotations, which compressed entries need at places of their own.
            turn_T: those of the tokens, `rope.at(batch.positions)`.
        Returns:
            y_TD.
        """
        H, C = self.config.num_attention_heads, self.config.head_dim
        latent_TQ = self.q_norm(self.wq_a(x_TD))
        q_THC = self.wq_b(latent_TQ).unflatten(-1, (H, C))
        eps = self.config.rms_norm_eps
        kv_TC = norm_and_rotate(self.wkv(x_TD), self.kv_norm.weight, eps, turn_T)
        fast = attention.fast(q_THC, kv_TC, self.attn_sink, memory.window.data)
        if fast is not None:
            o_THC = self._natively(fast, q_THC, kv_TC, latent_TQ, x_TD, batch, memory, rope, turn_T)
            return self.wo_b(self.wo_a(o_THC.unflatten(1, (self.config.o_groups, -1)).flatten(2)))
        q_THC = norm_and_rotate(q_THC, None, eps, turn_T.unsqueeze(1))
        near_KC = self._window(kv_TC, batch, memory)
        far = None
        if self.compressor is not None and memory.compressed is not None:
            entries = self.compressor(x_TD, batch, memory.compressed, rope)
            if entries is not None:
                self.compressor.store(entries, batch, memory.compressed)
            if self.indexer is not None and memory.index is not None:
                # keys first: a query sees the block that its own token completes
                self.indexer.remember(x_TD.detach(), batch, memory.index, rope)
                far = self.indexer.rows(latent_TQ, x_TD, turn_T, batch, memory.index)
                self._report(q_THC, near_KC, latent_TQ, x_TD, turn_T, batch, memory, far)
        if self.ratio and far is None and memory.compressed is not None:
            o_AHC = self._over_tiles(q_THC, near_KC, batch, memory.compressed)
        else:
            o_AHC = self._gathered(q_THC, near_KC, far, batch, memory.compressed)
        o_THC = F.pad(o_AHC[: batch.padded], (0, 0, 0, 0, 0, max(batch.padded - len(o_AHC), 0)))
        o_THC = rotate_tail(o_THC, turn_T.unsqueeze(1), inverse=True)
        return self.wo_b(self.wo_a(o_THC.unflatten(1, (self.config.o_groups, -1)).flatten(2)))

    def _natively(
        self,
        fast: ModuleType,
        q_THC: Tensor,
        kv_TC: Tensor,
        latent_TQ: Tensor,
        x_TD: Tensor,
        batch: Batch,
        memory: LayerMemory,
        rope: Rope,
        turn_T: Tensor,
    ) -> Tensor:
        """From projected queries to what is projected back, by the native kernels.

        What is read is a copy, since later passes write to the memory and gradients may be recorded; without them
        `Steps` is faster.
        """
        ring, far = memory.window, None
        if self.compressor is not None and memory.compressed is not None:
            compressed, chosen = memory.compressed, None
            entries = self.compressor(x_TD, batch, compressed, rope, fast)
            if entries is not None:
                self.compressor.store(entries, batch, compressed)
            if self.indexer is not None and memory.index is not None:
                with torch.set_grad_enabled(torch.is_grad_enabled() and self._watched(batch)):
                    self.indexer.remember(x_TD.detach(), batch, memory.index, rope, fast)
                    chosen = self.indexer.blocks(fast, latent_TQ, x_TD, turn_T, batch, memory.index)
            rows_GB = batch.seen_rows(self.ratio)
            G, B = rows_GB.shape
            if B:
                seen = compressed.read(rows_GB.flatten())
                seen = torch.cat([seen.new_zeros(1, seen.shape[1]), seen])
                far = attention.Blocks(self.ratio, seen, torch.arange(G).unsqueeze(1), B, chosen)
        new = memory.codec.encode(kv_TC)
        read = memory.codec.decode(new), memory.codec.decode(ring.data.clone())
        near = attention.Window(batch.spans_G6, *read, ring.size, self.config.sliding_window)
        eps = self.config.rms_norm_eps
        if self._watched(batch):
            with torch.no_grad():
                held = torch.cat([new.new_zeros(1, new.shape[1]), ring.data.index_select(0, batch.window.sources), new])
                turned = norm_and_rotate(q_THC, None, eps, turn_T.unsqueeze(1))
            self._report(turned, memory.codec.decode(held), latent_TQ, x_TD, turn_T, batch, memory, chosen)
        o_THC = attention.attend(fast, q_THC, turn_T, self.attn_sink, eps, near, far, kept=False)
        source, target = batch.window.written
        ring.data.index_copy_(0, target, new.index_select(0, source))
        return o_THC

    def _watched(self, batch: Batch) -> bool:
        """Whether a recorder wants to know what this layer reads."""
        return self.indexer is not None and batch.recorder is not None and batch.recorder.watches_attention

    def _report(
        self,
        q_THC: Tensor,
        near_KC: Tensor,
        latent_TQ: Tensor,
        x_TD: Tensor,
        turn_T: Tensor,
        batch: Batch,
        memory: LayerMemory,
        chosen: Tensor | tuple[Tensor, Tensor] | None,
    ) -> None:
        """Tell the recorder, if it asks, what this layer's queries read.

        Args:
            q_THC: normed and turned queries.
            near_KC: what `WindowPlan.index` points into.
            chosen: blocks [count, K], or their rows and mask [A, K], or None where each token reads all it sees.
        """
        rows_GB, count = batch.seen_rows(self.ratio), batch.count
        if not self._watched(batch) or not rows_GB.shape[1]:
            return
        assert self.indexer is not None and memory.index is not None and memory.compressed is not None
        assert batch.recorder is not None
        B = rows_GB.shape[1]
        if isinstance(chosen, tuple):
            block_of = torch.zeros(memory.index.entries.shape[0], dtype=torch.int64)
            block_of[rows_GB] = torch.arange(B).expand_as(rows_GB)
            chosen = block_of[chosen[0]].masked_fill(~chosen[1], -1)[:count]
        read_TB = torch.arange(B) < batch.visible_Q(self.ratio).unsqueeze(-1)
        if chosen is not None:
            read_TB &= torch.zeros(count, B + 1, dtype=torch.bool).scatter(1, chosen + 1, True)[:, 1:]
        q_TIJ, weights_TI = self.indexer.queries(latent_TQ.detach(), x_TD.detach(), turn_T)
        seen = Attended(
            q_THC=q_THC.detach()[:count],
            near_KC=near_KC.detach(),
            index_TW=batch.window.index[:count],
            mask_TW=batch.window.mask[:count],
            blocks_GBC=memory.compressed.read(rows_GB).detach(),
            read_TB=read_TB,
            sink_H=self.attn_sink.detach(),
            scale=self.config.head_dim**-0.5,
            index_q_TIJ=q_TIJ[:count],
            index_weights_TI=weights_TI[:count],
            keys_GBJ=wide(memory.index.read(rows_GB)),
            groups=tuple((group.first, group.length, len(group.spans)) for group in batch.groups),
        )
        batch.recorder.attended(self, seen)

    @staticmethod
    def _window(kv_TC: Tensor, batch: Batch, memory: LayerMemory) -> Tensor:
        """Add window entries; returns the array that `WindowPlan.index` points into, decoded."""
        plan, ring = batch.window, memory.window
        new = memory.codec.encode(kv_TC)
        seen = torch.cat([new.new_zeros(1, new.shape[1]), ring.data.index_select(0, plan.sources), new])
        source, target = plan.written
        ring.data.index_copy_(0, target, new.index_select(0, source))
        return memory.codec.decode(seen)

    def _gathered(
        self,
        q_THC: Tensor,
        near_KC: Tensor,
        far: tuple[Tensor, Tensor] | None,
        batch: Batch,
        memory: CompressedMemory | None,
    ) -> Tensor:
        """Window entries and chosen entries (CSA), or the window alone, gathered for each query; [A, H, C]."""
        plan = batch.window
        width = plan.index.shape[1] + (far[0].shape[1] if far is not None else 0)
        step = max(KEYS_OF_A_STEP // (width * near_KC.shape[1]) // batch.unit, 1) * batch.unit
        out = []
        for first in range(0, batch.attending, step):
            # a last query alone would be a batch of one
            part = slice(first, first + step) if batch.attending - first > 1 else slice(first - 1, None)
            keys = _look_up(near_KC, plan.index[part])
            mask = plan.mask[part]
            if far is not None and memory is not None:
                keys = torch.cat([keys, memory.read(far[0][part])], dim=1)
                mask = torch.cat([mask, far[1][part]], dim=1)
            o = attention.Attention(q_THC[part][: len(mask)], keys, mask, self.attn_sink, self.config.head_dim**-0.5)
            out.append(o.result()[-1:] if part.start < first else o.result())
        return out[0] if len(out) == 1 else torch.cat(out)

    def _over_tiles(self, q_THC: Tensor, near_KC: Tensor, batch: Batch, memory: CompressedMemory) -> Tensor:
        """Window entries gathered for each query, then all entries of its sequence (HCA), tile by tile."""
        plan = batch.window
        per_query = plan.index.shape[1] * near_KC.shape[1]
        # products over a multiple of the unit's rows, gathered ones over two queries or more
        heads = self.config.num_attention_heads
        unit = next(n for n in range(2, 2 * batch.unit + 1) if n * heads % batch.unit == 0)
        out = []
        for group in batch.groups:
            step = max(KEYS_OF_A_STEP // (per_query * len(group.spans)) // unit, 1) * unit
            parts = [
                self._some(q_THC, near_KC, batch, memory, group, slice(first, first + step), unit)
                for first in range(0, group.length, step)
            ]
            out.append((parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(0, 1))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _some(
        self,
        q_THC: Tensor,
        near_KC: Tensor,
        batch: Batch,
        memory: CompressedMemory,
        group: Group,
        part: slice,
        unit: int,
    ) -> Tensor:
        """Some tokens of each sequence of a group, [G, S, H, C]."""
        G = len(group.spans)
        q_GSHC = group.take(q_THC)[:, part]
        length = q_GSHC.shape[1]
        spare = -length % unit
        q = F.pad(q_GSHC, (0, 0, 0, 0, 0, spare)).flatten(0, 1)
        index = F.pad(group.take(batch.window.index)[:, part], (0, 0, 0, spare)).flatten(0, 1)
        mask = F.pad(group.take(batch.window.mask)[:, part], (0, 0, 0, spare)).flatten(0, 1)
        state = attention.Attention(q, _look_up(near_KC, index), mask, self.attn_sink, self.config.head_dim**-0.5)
        visible = batch.visible(self.ratio)[group.rows].reshape(G, -1)[:, part]
        seen_GS1 = F.pad(torch.from_numpy(visible), (0, spare)).unsqueeze(-1)
        for first, stop in tiles(int(visible.max())):
            rows = batch.shared_rows(group, self.ratio, first, stop)
            keys = memory.read_run(rows[0]).unsqueeze(0) if G == 1 else memory.read(torch.from_numpy(rows))
            state.read(keys, torch.arange(first, stop) < seen_GS1)
        return state.result().unflatten(0, (G, -1))[:, :length]
