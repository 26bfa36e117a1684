"""Every tensor of a release: name, stored dtype, shape and scale (architecture.md 3.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from abyssal.arch.config import ModelConfig
from abyssal.base.errors import ConfigError

Layout = Literal["flash", "base", "0731", "bf16", "fp32"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Format = Literal["fp4", "fp8", "plain"]

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
TILE = 128
GROUP = 32


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        name: as in the checkpoint.
        dtype: the dtype string of its safetensors header.
        shape: as stored; packed FP4 has half the columns.
        format: how a weight is stored; scales and everything else are plain.
        scale: name of the tensor that scales this one, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    format: Format = "plain"
    scale: str | None = None

    @property
    def elements(self) -> int:
        """Stored elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """Values of the model that it holds: two in a byte of FP4, none in a scale or a routing table."""
        if self.name.endswith((".scale", ".tid2eid")):
            return 0
        return self.elements * (2 if self.format == "fp4" else 1)


@dataclass(frozen=True)
class Totals:
    """Sums over tensors."""

    tensors: int
    nbytes: int
    elements: int


def default_layout(config: ModelConfig) -> Layout:
    """The layout in which a model of this configuration is released."""
    if config.expert_dtype is None:
        return "fp32" if config.torch_dtype == "float32" else "bf16"
    if config.expert_dtype == "fp8":
        return "base"
    return "0731" if config.dspark else "flash"


def is_draft_copy(name: str) -> bool:
    """True for the private embedding and head of a Base release's MTP block.

    Their exact names were never seen; the official converter skips what matches this rule.
    """
    return name.startswith("mtp.") and ("emb" in name or name.endswith("head.weight")) and "hc_head" not in name


def inventory(config: ModelConfig, layout: Layout | None = None) -> Iterator[TensorSpec]:
    """Every tensor of a release of this model.

    Args:
        config: the model's numbers.
        layout: flash (FP4 experts), base (FP8 experts, F32 scales), 0731 (FP4 and DSpark stages), or bf16 and
            fp32 (no quantisation); by default what `config` says.
    Raises:
        ConfigError: the layout needs DSpark numbers that the config lacks.
    """
    layout = layout or default_layout(config)
    if layout == "0731" and config.dspark is None:
        raise ConfigError("layout 0731 needs the dspark_* keys in the config: take the preset flash-0731")
    return _Inventory(config, layout).all()


class _Inventory:
    def __init__(self, config: ModelConfig, layout: Layout):
        self.c = config
        self.layout = layout
        self.plain_dtype = "F32" if layout == "fp32" else "BF16"
        self.scale_dtype = "F32" if layout == "base" else "F8_E8M0"

    def all(self) -> Iterator[TensorSpec]:
        c = self.c
        yield self._plain("embed.weight", c.vocab_size, c.hidden_size)
        yield self._plain("head.weight", c.vocab_size, c.hidden_size)
        yield from self._collapse("")
        for i, ratio in enumerate(c.backbone_ratios):
            yield from self._block(f"layers.{i}.", ratio, i < c.num_hash_layers)
        for stage in range(c.draft_stages):
            yield from self._block(f"mtp.{stage}.", 0, False)
        if c.dspark:
            yield from self._dspark()
        else:
            for stage in range(c.num_nextn_predict_layers):
                yield from self._mtp(f"mtp.{stage}.")

    def _plain(self, name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, self.plain_dtype, shape)

    def _fp8(self, name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
        if self.layout in ("bf16", "fp32"):
            yield self._plain(f"{name}.weight", rows, columns)
            return
        yield TensorSpec(f"{name}.weight", "F8_E4M3", (rows, columns), "fp8", f"{name}.scale")
        yield TensorSpec(f"{name}.scale", self.scale_dtype, (-(-rows // TILE), -(-columns // TILE)))

    def _routed(self, name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
        if self.layout not in ("flash", "0731"):
            yield from self._fp8(name, rows, columns)
            return
        yield TensorSpec(f"{name}.weight", "I8", (rows, columns // 2), "fp4", f"{name}.scale")
        yield TensorSpec(f"{name}.scale", "F8_E8M0", (rows, columns // GROUP))

    def _collapse(self, p: str) -> Iterator[TensorSpec]:
        N, D = self.c.hc_mult, self.c.hidden_size
        yield TensorSpec(f"{p}hc_head_fn", "F32", (N, N * D))
        yield TensorSpec(f"{p}hc_head_base", "F32", (N,))
        yield TensorSpec(f"{p}hc_head_scale", "F32", (1,))
        yield self._plain(f"{p}norm.weight", D)

    def _compressor(self, p: str, ratio: int, channels: int) -> Iterator[TensorSpec]:
        width = channels * (2 if ratio == 4 else 1)
        yield TensorSpec(f"{p}ape", "F32", (ratio, width))
        yield self._plain(f"{p}norm.weight", channels)
        yield self._plain(f"{p}wkv.weight", width, self.c.hidden_size)
        yield self._plain(f"{p}wgate.weight", width, self.c.hidden_size)

    def _attention(self, p: str, ratio: int) -> Iterator[TensorSpec]:
        c = self.c
        heads = c.num_attention_heads * c.head_dim
        yield TensorSpec(f"{p}attn_sink", "F32", (c.num_attention_heads,))
        yield self._plain(f"{p}q_norm.weight", c.q_lora_rank)
        yield self._plain(f"{p}kv_norm.weight", c.head_dim)
        yield from self._fp8(f"{p}wq_a", c.q_lora_rank, c.hidden_size)
        yield from self._fp8(f"{p}wq_b", heads, c.q_lora_rank)
        yield from self._fp8(f"{p}wkv", c.head_dim, c.hidden_size)
        yield from self._fp8(f"{p}wo_a", c.o_groups * c.o_lora_rank, heads // c.o_groups)
        yield from self._fp8(f"{p}wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        if ratio:
            yield from self._compressor(f"{p}compressor.", ratio, c.head_dim)
        if ratio == 4:
            yield from self._compressor(f"{p}indexer.compressor.", ratio, c.index_head_dim)
            yield self._plain(f"{p}indexer.weights_proj.weight", c.index_n_heads, c.hidden_size)
            yield from self._fp8(f"{p}indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)

    def _block(self, p: str, ratio: int, hashed: bool) -> Iterator[TensorSpec]:
        c = self.c
        N, D, width = c.hc_mult, c.hidden_size, c.moe_intermediate_size
        yield from self._attention(f"{p}attn.", ratio)
        for site in ("attn", "ffn"):
            yield self._plain(f"{p}{site}_norm.weight", D)
            yield TensorSpec(f"{p}hc_{site}_fn", "F32", ((2 + N) * N, N * D))
            yield TensorSpec(f"{p}hc_{site}_base", "F32", ((2 + N) * N,))
            yield TensorSpec(f"{p}hc_{site}_scale", "F32", (3,))
        yield self._plain(f"{p}ffn.gate.weight", c.n_routed_experts, D)
        if hashed:
            yield TensorSpec(f"{p}ffn.gate.tid2eid", "I64", (c.vocab_size, c.num_experts_per_tok))
        else:
            yield TensorSpec(f"{p}ffn.gate.bias", "F32", (c.n_routed_experts,))
        for e in range(c.n_routed_experts):
            yield from self._routed(f"{p}ffn.experts.{e}.w1", width, D)
            yield from self._routed(f"{p}ffn.experts.{e}.w2", D, width)
            yield from self._routed(f"{p}ffn.experts.{e}.w3", width, D)
        yield from self._fp8(f"{p}ffn.shared_experts.w1", width, D)
        yield from self._fp8(f"{p}ffn.shared_experts.w2", D, width)
        yield from self._fp8(f"{p}ffn.shared_experts.w3", width, D)

    def _mtp(self, p: str) -> Iterator[TensorSpec]:
        c = self.c
        yield from self._fp8(f"{p}e_proj", c.hidden_size, c.hidden_size)
        yield from self._fp8(f"{p}h_proj", c.hidden_size, c.hidden_size)
        yield self._plain(f"{p}enorm.weight", c.hidden_size)
        yield self._plain(f"{p}hnorm.weight", c.hidden_size)
        yield from self._collapse(p)
        if self.layout == "base":
            yield self._plain(f"{p}emb.weight", c.vocab_size, c.hidden_size)
            yield self._plain(f"{p}head.weight", c.vocab_size, c.hidden_size)

    def _dspark(self) -> Iterator[TensorSpec]:
        c, spark = self.c, self.c.dspark
        assert spark is not None
        last = f"mtp.{c.draft_stages - 1}."
        yield from self._fp8("mtp.0.main_proj", c.hidden_size, len(spark.target_layer_ids) * c.hidden_size)
        yield self._plain("mtp.0.main_norm.weight", c.hidden_size)
        yield from self._collapse(last)
        for table in ("markov_w1", "markov_w2"):
            yield self._plain(f"{last}markov_head.{table}.weight", c.vocab_size, spark.markov_rank)
        yield self._plain(f"{last}confidence_head.proj.weight", 1, c.hidden_size + spark.markov_rank)


def totals(specs: Iterable[TensorSpec]) -> Totals:
    """Number, bytes and stored elements."""
    count = size = elements = 0
    for spec in specs:
        count += 1
        size += spec.nbytes
        elements += spec.elements
    return Totals(count, size, elements)


def parameters(specs: Iterable[TensorSpec]) -> int:
    """Values of the whole model, draft stages included, scales and routing tables not."""
    return sum(spec.parameters for spec in specs)


def active_parameters(config: ModelConfig, specs: Iterable[TensorSpec]) -> int:
    """Backbone values that one decoded token uses: its own experts, and one row of the embedding is free."""
    total = 0
    for spec in specs:
        if spec.name == "embed.weight" or spec.name.startswith("mtp."):
            continue
        routed = re.search(r"\.experts\.(\d+)\.", spec.name)
        if routed is None or int(routed[1]) < config.num_experts_per_tok:
            total += spec.parameters
    return total
