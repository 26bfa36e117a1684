"""The compressor: whole blocks of tokens become one entry each (paper 2.3, architecture.md 2.6).

One class serves CSA (blocks of 4, overlapping), HCA (blocks of 128) and the indexer's keys.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind
from abyssal.kernels.pool import compress, pool
from abyssal.kernels.recompute import recomputed
from abyssal.kernels.rotary import norm_and_rotate
from abyssal.kvcache.memory import CompressedMemory
from abyssal.model.batch import Batch, BlockPlan
from abyssal.model.linear import WideLinear
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope
from abyssal.quant.precision import wide


class Compressor(nn.Module):
    """Pool M tokens into an entry of C channels, normalise it, rotate it at its first token's position.

    A CSA block pools its own M tokens and the M tokens of the block before it: the first half of the channels
    plays the part of the block before, the second half that of the current one.

    Args:
        config: the model's numbers.
        ratio: M, 4 or 128.
        channels: C, head_dim or index_head_dim.
    """

    def __init__(self, config: ModelConfig, ratio: int, channels: int):
        super().__init__()
        self.ratio = ratio
        self.channels = channels
        width = channels * (2 if LayerKind.of(ratio) is LayerKind.CSA else 1)
        self.wkv = WideLinear(config.hidden_size, width)
        self.wgate = WideLinear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = RMSNorm(channels, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, batch: Batch, memory: CompressedMemory, rope: Rope, fast: ModuleType | None = None
    ) -> Tensor | None:
        """Add tokens to the rings and return the entries that they complete.

        Args:
            x_TD: normed input of the sublayer.
            batch: where the tokens stand.
            memory: this compressor's memory; only its rings are written.
            rope: the layer's rotations.
            fast: the native kernels, to get their bits, with the reference's gradients.
        Returns:
            entries [N, C] of the blocks of `batch.blocks(ratio)`, in the dtype of x, or None for no block.
        """
        plan = batch.blocks(self.ratio)
        values_TW, raw_TW = self.wkv(x_TD), self.wgate(x_TD)
        logits_TW = raw_TW + wide(self.ape).index_select(0, plan.places)
        slots = self._slots(values_TW, logits_TW, plan, memory)
        entries_NC = None
        if slots is not None:
            norm = partial(norm_and_rotate, eps=self.norm.eps, turn=rope.at(plan.starts))
            if fast is None:
                entries_NC = norm(pool(*slots).to(x_TD.dtype), self.norm.weight)
            else:
                with torch.no_grad():
                    rings = memory.values.data.clone(), memory.logits.data.clone(), memory.values.size
                    turns, weight = batch.block_turns(self.ratio, rope), (self.norm.weight, self.norm.eps)
                    args = values_TW, raw_TW, self.ape, batch.spans_G6, rings, *weight, turns, None
                    found = compress(fast, *args)
                entries_NC = recomputed(found, lambda v, l, w: norm(pool(v, l), w), *slots, self.norm.weight)
        source, target = plan.written
        memory.values.data.index_copy_(0, target, values_TW.index_select(0, source))
        memory.logits.data.index_copy_(0, target, logits_TW.index_select(0, source))
        return entries_NC

    def _slots(
        self, values_TW: Tensor, logits_TW: Tensor, plan: BlockPlan, memory: CompressedMemory
    ) -> tuple[Tensor, Tensor] | None:
        """Values and logits of the tokens of every complete block, [N, M or 2M, C]."""
        if plan.own is None:
            return None
        # the block before the first one: no value, and no share in the softmax
        absent = values_TW.new_zeros(1, values_TW.shape[1])
        values = torch.cat([absent, memory.values.data.index_select(0, plan.sources), values_TW])
        logits = torch.cat(
            [absent.fill_(float("-inf")), memory.logits.data.index_select(0, plan.sources), logits_TW]
        )
        C = self.channels
        if plan.before is None:
            return values[plan.own], logits[plan.own]
        return (
            torch.cat([values[plan.before][..., :C], values[plan.own][..., C:]], dim=1),
            torch.cat([logits[plan.before][..., :C], logits[plan.own][..., C:]], dim=1),
        )

    def store(self, entries_NC: Tensor, batch: Batch, memory: CompressedMemory) -> None:
        """Write entries that `forward` returned, but for those that are known already."""
        plan = batch.blocks(self.ratio)
        new = entries_NC if plan.kept is None else entries_NC.index_select(0, plan.kept)
        memory.entries.index_copy_(0, plan.entry_rows, memory.codec.encode(new))
