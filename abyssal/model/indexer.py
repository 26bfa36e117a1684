"""The lightning indexer: which compressed blocks a query of a CSA layer reads (architecture.md 2.7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kernels.index_topk import choose, index_scores, top_blocks
from abyssal.kernels.rotary import rotate_tail
from abyssal.kvcache.sequence import CompressedState
from abyssal.model.compressor import Compressor
from abyssal.model.linear import Linear, QuantLinear
from abyssal.model.rope import Rope
from abyssal.quant.fp4 import fake_fp4
from abyssal.quant.hadamard import hadamard
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide


class Indexer(nn.Module):
    """Scores compressed blocks with I small heads; the best `index_topk` are read.

    Both sides are turned by a Hadamard matrix before they are rounded to FP4, never one side alone.
    """

    def __init__(self, config: ModelConfig, ratio: int, numerics: Numerics):
        super().__init__()
        self.config = config
        self.numerics = numerics
        I, J = config.index_n_heads, config.index_head_dim
        self.wq_b = QuantLinear(config.q_lora_rank, I * J, numerics)
        self.weights_proj = Linear(config.hidden_size, I)
        self.compressor = Compressor(config, ratio, J)

    def remember(self, x_BSD: Tensor, start: int, state: CompressedState, rope: Rope) -> None:
        """Add the index keys of the blocks that these tokens complete."""
        keys = self.compressor(x_BSD, start, state.tail, rope)
        if keys is not None:
            state.store.append(self._turned(keys))

    def queries(self, latent_BSQ: Tensor, x_BSD: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [B, S, I, J] and head weights [B, S, I].

        Args:
            latent_BSQ: the attention's normed query latent, which both share.
            x_BSD: normed input of the sublayer.
            turn: rotations at the positions of the tokens, broadcast over heads.
        """
        I, J = self.config.index_n_heads, self.config.index_head_dim
        q = rotate_tail(self.wq_b(latent_BSQ).unflatten(-1, (I, J)), turn)
        q = self._turned(q)
        if self.numerics.index != "exact":
            q = fake_fp4(q)
        return q, self.weights_proj(x_BSD) * (J**-0.5 * I**-0.5)

    def keep(self, q_BSIJ: Tensor, weights_BSI: Tensor, visible_S: Tensor, keys_BTJ: Tensor) -> Tensor:
        """True where a query reads a block, [B, S, T]; at most `index_topk` of the visible ones."""
        k = self.config.index_topk
        if keys_BTJ.shape[1] <= k:
            return choose(q_BSIJ.new_empty(*q_BSIJ.shape[:2], keys_BTJ.shape[1]), visible_S, k)
        with torch.no_grad():  # a choice has no gradient
            scores = index_scores(wide(q_BSIJ), wide(weights_BSI), wide(keys_BTJ))
            return choose(scores, visible_S, k)

    def top(self, q_BSIJ: Tensor, weights_BSI: Tensor, keys_BTJ: Tensor) -> Tensor:
        """Numbers of the chosen blocks of one query that sees all T of them, [B, 1, min(k, T)], rising."""
        with torch.no_grad():
            return top_blocks(index_scores(wide(q_BSIJ), wide(weights_BSI), wide(keys_BTJ)), self.config.index_topk)

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.numerics.index == "exact" else hadamard(x)
