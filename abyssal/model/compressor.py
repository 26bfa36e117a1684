"""The compressor: whole blocks of tokens become one entry each (paper 2.3, architecture.md 2.6).

One class serves CSA (blocks of 4, overlapping), HCA (blocks of 128) and the indexer's keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind
from abyssal.kernels.pool import pool
from abyssal.kernels.rotary import rotate_tail
from abyssal.kvcache.tail import Tail
from abyssal.model.linear import WideLinear
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope
from abyssal.quant.precision import wide


class Compressor(nn.Module):
    """Pool M tokens into an entry of C channels, normalise it, rotate it at its first token's position.

    Args:
        config: the model's numbers.
        ratio: M, 4 or 128.
        channels: C, head_dim or index_head_dim.
    """

    def __init__(self, config: ModelConfig, ratio: int, channels: int):
        super().__init__()
        self.ratio = ratio
        width = channels * (2 if LayerKind.of(ratio) is LayerKind.CSA else 1)
        self.wkv = WideLinear(config.hidden_size, width)
        self.wgate = WideLinear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = RMSNorm(channels, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, start: int, tail: Tail, rope: Rope) -> Tensor | None:
        """Add tokens and return the entries that they complete.

        Args:
            x_BSD: normed input of the sublayer.
            start: position of its first token.
            tail: the unfinished block; it is advanced.
            rope: the layer's rotations.
        Returns:
            entries [B, number of completed blocks, C] in the dtype of x, or None.
        """
        length = x_BSD.shape[1]
        places = torch.arange(start, start + length, device=x_BSD.device) % self.ratio
        first_block = tail.blocks
        slots = tail.push(self.wkv(x_BSD), self.wgate(x_BSD) + wide(self.ape)[places])
        if slots is None:
            return None
        entries_BNC = self.norm(pool(*slots).to(x_BSD.dtype))
        first_tokens = torch.arange(first_block, tail.blocks, device=x_BSD.device) * self.ratio
        return rotate_tail(entries_BNC, rope.at(first_tokens))
