"""Operations of one decoded token (architecture.md 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What an operation costs relative to one FP8 operation.

    The report gives no list. `FP8_EQUIVALENT` is the usual ratio of hardware rates and reproduces its figures.
    """

    fp8: float
    fp4_weight: float
    high: float
    attention: float
    index_fp8: float
    index_fp4: float


FP8_EQUIVALENT = Prices(fp8=1, fp4_weight=1, high=2, attention=2, index_fp8=1, index_fp4=0.5)
NO_FP4_CREDIT = Prices(fp8=1, fp4_weight=1, high=2, attention=2, index_fp8=1, index_fp4=1)
RAW_COUNT = Prices(fp8=1, fp4_weight=1, high=1, attention=1, index_fp8=1, index_fp4=1)
PRICE_LISTS = MappingProxyType(
    {"fp8-equivalent": FP8_EQUIVALENT, "no fp4 credit": NO_FP4_CREDIT, "raw count": RAW_COUNT}
)


@dataclass(frozen=True)
class Flops:
    """Priced operations of one token: products with weights, attention over entries, index scores."""

    gemm: float
    core: float
    index: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.gemm + self.core + self.index


@dataclass(frozen=True)
class UsedParameters:
    """Parameters that one decoded token multiplies with, by the precision of the product."""

    fp8: int
    fp4: int
    high: int

    @property
    def total(self) -> int:
        """Their sum; the embedding is a look-up and not counted."""
        return self.fp8 + self.fp4 + self.high


def used_parameters(c: ModelConfig) -> UsedParameters:
    """Split by precision; `wo_a` counts as FP8 as stored, although the reference multiplies it in bfloat16."""
    heads = c.num_attention_heads * c.head_dim
    csa = c.kinds.count(LayerKind.CSA)
    hca = c.kinds.count(LayerKind.HCA)
    layers, D, N = c.num_hidden_layers, c.hidden_size, c.hc_mult
    attention = D * c.q_lora_rank + c.q_lora_rank * heads + D * c.head_dim
    attention += heads * c.o_lora_rank + c.o_groups * c.o_lora_rank * D
    expert = 3 * D * c.moe_intermediate_size
    fp8 = layers * (attention + c.n_shared_experts * expert)
    fp8 += csa * c.q_lora_rank * c.index_n_heads * c.index_head_dim
    high = csa * (4 * D * c.head_dim + 4 * D * c.index_head_dim + D * c.index_n_heads)
    high += hca * 2 * D * c.head_dim
    high += layers * (D * c.n_routed_experts + 2 * (2 + N) * N * N * D)
    high += N * N * D + c.vocab_size * D
    return UsedParameters(fp8, layers * c.num_experts_per_tok * expert, high)


def decode_flops(c: ModelConfig, context: int, prices: Prices = FP8_EQUIVALENT) -> Flops:
    """Operations of decoding one token at a context of so many tokens."""
    used = used_parameters(c)
    gemm = 2 * (prices.fp8 * used.fp8 + prices.fp4_weight * used.fp4 + prices.high * used.high)
    core = index = 0.0
    for kind in c.kinds:
        entries = min(context, c.sliding_window)
        if kind is LayerKind.CSA:
            blocks = context // kind.value
            entries += min(c.index_topk, blocks)
            index += 2 * c.index_n_heads * c.index_head_dim * blocks
        elif kind is LayerKind.HCA:
            entries += context // kind.value
        core += 4 * c.num_attention_heads * c.head_dim * entries
    return Flops(gemm, prices.attention * core, prices.index_fp4 * index)
