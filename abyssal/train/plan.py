"""What a run would need on many GPUs, computed and never measured: memory, mesh, operations, tokens per second.

The numbers follow from what `abyssal.train.parallel` does: float32 weights, gradients and optimiser buffers spread over
all GPUs, a block gathered while it runs, experts spread over `experts` neighbours. Pipelines are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind
from abyssal.arch.tensors import TensorSpec, inventory
from abyssal.base.errors import ConfigError
from abyssal.efficiency.flops import RAW_COUNT, decode_flops
from abyssal.train.optimiser import SMALL, takes_adamw

FLOAT = 4  # bytes
GB = 10**9
MOST = 1 << 16  # GPUs that are tried
USABLE = 0.9  # of a GPU's memory; the rest is for driver, exchanges and gaps


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: for the text.
        memory: bytes.
        peak: operations a second; of float32 products with TF32 inputs, since the trainer multiplies float32.
    """

    name: str = "H100 80 GB"
    memory: float = 80e9
    peak: float = 495e12


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU.

    Attributes:
        weights, gradients, optimiser: this GPU's shares.
        gathered: what FSDP has whole at once: embedding, head, and a block with its gradients and the next block.
        activations: what a pass keeps for the way back.
    """

    weights: float
    gradients: float
    optimiser: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.optimiser + self.gathered + self.activations


@dataclass(frozen=True)
class Plan:
    """A run on so many GPUs; everything is computed.

    Attributes:
        gpus: how many, all data-parallel.
        experts: how many neighbours share the experts of a layer.
        replicas: groups of such neighbours, over which FSDP spreads each expert.
        tokens: of a pass on one GPU, in sequences of `length`.
        recompute: whether blocks run again on the way back.
        need: bytes on each GPU; `other` those with recomputation the other way.
        flops: operations of the model for a token, forward and back, without what is recomputed.
        mfu: share of the peak that the model's operations are assumed to reach.
    """

    gpus: int
    experts: int
    replicas: int
    tokens: int
    length: int
    recompute: bool
    need: Need
    other: Need
    flops: float
    mfu: float
    gpu: Gpu

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs."""
        return self.mfu * self.gpu.peak * self.gpus / self.flops

    def text(self) -> str:
        """Lines for a terminal."""
        n, other = self.need, "without" if self.recompute else "with"
        rows = [
            f"computed, not measured: {self.gpus} x {self.gpu.name}",
            f"mesh             data {self.gpus}, experts over {self.experts}, each on {self.replicas}; no pipeline",
            f"a pass           {self.tokens:,} tokens on each GPU, sequences of {self.length:,}",
            "memory per GPU",
            *(
                f"  {name:<15}{getattr(n, name) / GB:9.2f} GB"
                for name in ("weights", "gradients", "optimiser", "gathered", "activations")
            ),
            f"  {'total':<15}{n.total / GB:9.2f} GB of {self.gpu.memory / GB:.0f}, {USABLE:.0%} usable",
            f"  {other + ' recomputation':<24}{self.other.total / GB:.2f} GB",
            f"operations       {self.flops / GB:,.2f} GFLOP for a token, forward and back",
            f"speed            {self.tokens_per_s:,.0f} tokens/s,"
            f" if {self.mfu:.0%} of {self.gpu.peak / 1e12:,.0f} TFLOP/s are reached",
        ]
        return "\n".join(rows)


@dataclass(frozen=True)
class _Sizes:
    """Parameters: all, those with a second AdamW moment, outside blocks, of the largest block but for its experts,
    and the experts of one block."""

    total: int
    adamw: int
    root: int
    block: int
    experts: int


def _block_of(spec: TensorSpec) -> str | None:
    parts = spec.name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else None


def _sizes(config: ModelConfig) -> _Sizes:
    specs = [spec for spec in inventory(replace(config, dspark=None), "fp32") if spec.parameters]
    total = sum(spec.parameters for spec in specs)
    with torch.device("meta"):
        adamw = sum(s.parameters for s in specs if takes_adamw(s.name, torch.empty(s.shape), total < SMALL))
    root = sum(spec.parameters for spec in specs if _block_of(spec) is None)
    blocks: dict[str, int] = {}
    experts: dict[str, int] = {}
    for spec in specs:
        if (block := _block_of(spec)) is not None:
            found = experts if ".ffn.experts." in spec.name else blocks
            found[block] = found.get(block, 0) + spec.parameters
    return _Sizes(total, adamw, root, max(blocks.values()), max(experts.values()))


def kept_floats(config: ModelConfig, kind: LayerKind, spread: bool) -> int:
    """Values that a block keeps for the way back, for each token, in the sparse stage.

    Args:
        config: the model's numbers.
        kind: of the block.
        spread: whether tokens travel to their experts.
    """
    c = config
    D, F, K = c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    heads = c.num_attention_heads * c.head_dim
    kept = 2 * (c.hc_mult * D + 2 * D)  # of each sublayer: the streams, what enters it and what leaves it
    kept += 2 * c.q_lora_rank + 3 * heads + 2 * c.head_dim + c.o_groups * c.o_lora_rank
    kept += 2 * F * (K + c.n_shared_experts) + 3 * c.n_routed_experts
    if spread:
        kept += 2 * K * (D + 1)  # pairs of a token and an expert, on their way there and back
    width = {LayerKind.SWA: 0, LayerKind.CSA: 2, LayerKind.HCA: 1}[kind]
    kept += 4 * width * c.head_dim  # values and logits, and those of the blocks
    if kind is LayerKind.CSA:
        index = c.index_n_heads * c.index_head_dim
        kept += 4 * width * c.index_head_dim + 3 * index
        kept += c.index_topk * (2 * c.index_n_heads + c.index_head_dim)  # scores, and the keys of each query
    return kept


def _activations(config: ModelConfig, tokens: int, recompute: bool, spread: bool) -> float:
    kinds = [*config.kinds, *[LayerKind.SWA] * (0 if config.dspark else config.num_nextn_predict_layers)]
    floats = [kept_floats(config, kind, spread) for kind in kinds]
    streams = config.hc_mult * config.hidden_size
    # the way back holds a block's gradients beside its values
    kept = len(kinds) * streams + 2 * max(floats) if recompute else sum(floats) + max(floats)
    return float(FLOAT * tokens * kept)


def training_flops(config: ModelConfig, length: int) -> float:
    """Operations for a token, forward and back (three times forward), at the mean context of a sequence."""
    ratios = (0,) * (1 + config.num_nextn_predict_layers)
    mtp = 0.0
    if config.num_nextn_predict_layers and not config.dspark:
        one = replace(config, num_hidden_layers=1, num_hash_layers=0, compress_ratios=ratios)
        mtp = decode_flops(one, length // 2, RAW_COUNT).total  # the block, and the head again
        mtp += 2 * (1 + config.hc_mult) * config.hidden_size**2
    return 3 * (decode_flops(config, length // 2, RAW_COUNT).total + mtp * config.num_nextn_predict_layers)


def _need(config: ModelConfig, sizes: _Sizes, gpus: int, experts: int, tokens: int, recompute: bool) -> Need:
    share = FLOAT / gpus
    gathered = 0
    if gpus > 1:
        block = sizes.block + (sizes.experts // experts if gpus > experts else 0)
        gathered = 2 * sizes.root + 3 * block  # weights and gradients, and the weights of the next block
    return Need(
        weights=share * sizes.total,
        gradients=share * sizes.total,
        optimiser=share * (sizes.total + sizes.adamw),
        gathered=float(FLOAT * gathered),
        activations=_activations(config, tokens, recompute, experts > 1),
    )


def _divisors(config: ModelConfig, gpus: int) -> Iterator[int]:
    """Ways to spread experts, few exchanges first."""
    return (n for n in range(1, min(gpus, config.n_routed_experts) + 1) if gpus % n == config.n_routed_experts % n == 0)


def plan(
    config: ModelConfig,
    gpus: int,
    *,
    gpu: Gpu | None = None,
    tokens: int = 4096,
    length: int = 4096,
    recompute: bool = True,
    mfu: float = 0.3,
) -> Plan:
    """Plan a run.

    Args:
        config: the model's numbers.
        gpus: how many there are.
        gpu: what they are.
        tokens: of a pass on one GPU.
        length: of its sequences.
        recompute: whether blocks run again on the way back.
        mfu: share of the peak to assume.
    Returns:
        the plan with the fewest neighbours that have to share experts.
    Raises:
        ConfigError: it does not fit; the smallest number of GPUs that does is named.
    """
    if gpus < 1 or tokens < length or length < 1 or not 0 < mfu <= 1:
        raise ConfigError(
            f"cannot plan {gpus} GPUs, passes of {tokens} tokens in sequences of {length}, MFU {mfu}: give one GPU or"
            " more, a pass no shorter than a sequence, and an MFU above 0 and up to 1"
        )
    gpu, sizes = gpu or Gpu(), _sizes(config)

    def best(count: int) -> tuple[int, Need] | None:
        for experts in _divisors(config, count):
            need = _need(config, sizes, count, experts, tokens, recompute)
            if need.total <= USABLE * gpu.memory:
                return experts, need
        return None

    found = best(gpus)
    if found is None:
        least = next((count for count in range(1, MOST + 1) if best(count)), None)
        if least is None:
            raise ConfigError(
                f"passes of {tokens:,} tokens do not fit into {gpu.name}, however many there are: make them shorter"
                + ("" if recompute else ", or recompute")
            )
        raise ConfigError(f"the run does not fit into {gpus} x {gpu.name}: it needs {least} at least")
    experts, need = found
    other = _need(config, sizes, gpus, experts, tokens, not recompute)
    flops = training_flops(config, length)
    return Plan(gpus, experts, gpus // experts, tokens, length, recompute, need, other, flops, mfu, gpu)
