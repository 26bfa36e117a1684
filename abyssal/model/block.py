"""A block: attention and MoE, each between two mixes of the residual streams (architecture.md 2.1)."""

from __future__ import annotations

from torch import Tensor, nn

from abyssal.arch.config import ModelConfig
from abyssal.kvcache.memory import LayerMemory
from abyssal.model.attention import Attention
from abyssal.model.batch import Batch
from abyssal.model.mhc import Site, site_parameters
from abyssal.model.moe import MoE
from abyssal.model.norm import RMSNorm
from abyssal.model.rope import Rope
from abyssal.model.steps import Steps
from abyssal.quant.numerics import Numerics


class Block(nn.Module):
    """One layer of the backbone, or the body of an MTP block.

    Args:
        config: the model's numbers.
        ratio: the layer's compression ratio.
        hashed: True if experts are chosen by token id.
        numerics: which roundings are simulated.
    """

    def __init__(self, config: ModelConfig, ratio: int, hashed: bool, numerics: Numerics):
        super().__init__()
        self.config = config
        self.ratio = ratio
        self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale = site_parameters(config)
        self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale = site_parameters(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio, numerics)
        self.ffn = MoE(config, hashed, numerics)
        self._steps = Steps(self)

    def forward(
        self, streams_TND: Tensor, ids_T: Tensor, batch: Batch, memory: LayerMemory, rope: Rope, turn_T: Tensor
    ) -> Tensor:
        """streams_TND -> streams_TND for the padded rows of a batch; its tokens are added to the memory."""
        fast = batch.recorder is None  # in one call, nothing can be noted
        after_TND = self._steps.attention(streams_TND, batch, memory, rope, turn_T) if fast else None
        if after_TND is None:
            site = Site(self.config, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale)
            x_TD, gates = site.enter(streams_TND, self.attn_norm)
            after_TND = site.leave(self.attn(x_TD, batch, memory, rope, turn_T), streams_TND, gates)
        done_TND = self._steps.moe(after_TND, ids_T) if fast else None
        if done_TND is None:
            site = Site(self.config, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale)
            x_TD, gates = site.enter(after_TND, self.ffn_norm)
            done_TND = site.leave(self.ffn(x_TD, ids_T, batch.count, batch.recorder), after_TND, gates)
        return done_TND
