"""Multi-token prediction: one more block that predicts the token after the next (architecture.md 2.11)."""

from __future__ import annotations

from torch import Tensor

from abyssal.arch.config import ModelConfig
from abyssal.kvcache.memory import LayerMemory
from abyssal.model.batch import Batch
from abyssal.model.block import Block
from abyssal.model.linear import QuantLinear
from abyssal.model.mhc import collapse_head, head_parameters
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope
from abyssal.quant.numerics import Numerics


class MTPBlock(Block):
    """A window-only block fed with the backbone's streams and the embedding of the next token.

    Embedding and head are the backbone's. It needs all N streams, taken before the collapse (trap 29).
    """

    def __init__(self, config: ModelConfig, numerics: Numerics):
        super().__init__(config, 0, False, numerics)
        D = config.hidden_size
        self.e_proj = QuantLinear(D, D, numerics)
        self.h_proj = QuantLinear(D, D, numerics)
        self.enorm = RMSNorm(D, config.rms_norm_eps)
        self.hnorm = RMSNorm(D, config.rms_norm_eps)
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = head_parameters(config)

    def predict(
        self,
        streams_TND: Tensor,
        next_embedding_TD: Tensor,
        next_ids_T: Tensor,
        batch: Batch,
        memory: LayerMemory,
        rope: Rope,
    ) -> tuple[Tensor, Tensor]:
        """One step of prediction.

        Args:
            streams_TND: the backbone's last streams at token i (or this block's own, for a longer draft).
            next_embedding_TD: embedding of token i + 1, and next_ids_T its id.
            batch: where the tokens i stand; all rows are padded as it says.
            memory: this block's window.
        Returns:
            normed z_TD, which the shared head turns into logits for token i + 2, and this block's streams.
        """
        embedded = self.e_proj(self.enorm(next_embedding_TD)).unsqueeze(1)
        streams_TND = embedded + self.h_proj(self.hnorm(streams_TND))
        turn_T = rope.at(batch.positions)
        streams_TND = self.forward(streams_TND, next_ids_T, batch, memory, rope, turn_T)
        head = self.hc_head_fn, self.hc_head_base, self.hc_head_scale
        return collapse_head(streams_TND, *head, self.norm.weight, self.config), streams_TND
