"""The released models and our small one, as configurations (architecture.md 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from abyssal.arch.config import DSpark, ModelConfig, RopeScaling
from abyssal.base.errors import ConfigError

_YARN = RopeScaling(factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)


def _flash() -> ModelConfig:
    return ModelConfig(
        vocab_size=129280,
        hidden_size=4096,
        num_hidden_layers=43,
        num_hash_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        sliding_window=128,
        compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
        compress_rope_theta=160000,
        rope_theta=10000,
        rope_scaling=_YARN,
        max_position_embeddings=1048576,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        n_routed_experts=256,
        num_experts_per_tok=6,
        moe_intermediate_size=2048,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        hc_eps=1e-6,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        torch_dtype="bfloat16",
        expert_dtype="fp4",
    )


def _pro() -> ModelConfig:
    return replace(
        _flash(),
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    )


def _with_dspark(config: ModelConfig, rank: int) -> ModelConfig:
    layers = config.num_hidden_layers
    spark = DSpark(
        block_size=5,
        noise_token_id=128799,
        target_layer_ids=(layers - 3, layers - 2, layers - 1),
        markov_rank=rank,
    )
    return replace(config, dspark=spark, compress_ratios=(*config.backbone_ratios, 0, 0, 0))


def _nano() -> ModelConfig:
    """The bundled model: every mechanism of V4 at a size that trains on a CPU (training.md 8.2)."""
    return replace(
        _flash(),
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        num_hash_layers=1,
        num_attention_heads=4,
        head_dim=96,
        qk_rope_head_dim=32,
        q_lora_rank=128,
        o_groups=4,  # of 96 columns; transformers misreads the scales of two, whose 192 are one and a half blocks
        o_lora_rank=128,
        sliding_window=128,  # as Flash: with 64, arguments of tool calls lie beyond it
        compress_ratios=(0, 4, 128, 4, 128, 4, 0),
        index_n_heads=16,
        index_head_dim=64,
        index_topk=64,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
    )


_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "flash": _flash,
    "pro": _pro,
    "flash-base": lambda: replace(_flash(), expert_dtype="fp8"),
    "pro-base": lambda: replace(_pro(), expert_dtype="fp8"),
    "flash-0731": lambda: _with_dspark(_flash(), 256),
    "pro-0813": lambda: _with_dspark(_pro(), 512),
    "nano": _nano,
}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration of a released model, or of `nano`.

    Raises:
        ConfigError: there is no such preset.
    """
    try:
        return _PRESETS[name.lower()]()
    except KeyError:
        raise ConfigError(f"no preset {name!r}: choose from {', '.join(PRESETS)}") from None
