"""Random small models for the tests: every layer kind, odd sizes, all parameters away from their defaults."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.model import Transformer
from abyssal.model.init import initialise
from abyssal.quant.numerics import Numerics

RATIO_SETS = ((0, 4, 128), (4,), (128,), (0,), (128, 128, 4), (4, 128, 4), (0, 0, 4), (4, 4))


def random_config(seed: int) -> ModelConfig:
    """A small configuration; seeds 0..7 cover every set of layer kinds."""
    rng = random.Random(seed)
    ratios = RATIO_SETS[seed % len(RATIO_SETS)]
    rope = rng.choice([8, 12, 16])
    groups = rng.choice([1, 2])
    experts = rng.choice([4, 5, 8])
    return replace(
        preset("nano"),
        vocab_size=rng.choice([61, 80, 97]),
        hidden_size=rng.choice([24, 40, 64]),
        num_hidden_layers=len(ratios),
        compress_ratios=(*ratios, 0),
        num_hash_layers=rng.randint(0, len(ratios)),
        num_attention_heads=groups * rng.choice([1, 2, 3]),
        head_dim=rope + rng.choice([12, 24, 40, 72]),
        qk_rope_head_dim=rope,
        q_lora_rank=rng.choice([16, 20, 32]),
        o_groups=groups,
        o_lora_rank=rng.choice([8, 12]),
        sliding_window=rng.choice([3, 8, 16, 64]),
        index_n_heads=rng.choice([16, 24]),
        index_head_dim=32,
        index_topk=rng.choice([2, 5, 8]),
        n_routed_experts=experts,
        num_experts_per_tok=rng.choice([1, 2, 3]),
        moe_intermediate_size=rng.choice([16, 24]),
        hc_mult=rng.choice([2, 3, 4, 4]),
        routed_scaling_factor=rng.choice([1.0, 1.5, 2.5]),
        swiglu_limit=rng.choice([0.5, 1.0, 10.0]),
        expert_dtype=None,
    )


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64, numerics: Numerics | None = None
) -> Transformer:
    """A model whose logits have a standard deviation near 1; equal seeds give equal weights in every dtype."""
    model = initialise(Transformer(config, dtype=torch.float64, numerics=numerics).double(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.dim() < 2 or "ape" in name:
                p.add_(0.3 * noise)
            else:
                p.copy_(noise * (1.0 if name == "embed.weight" else 1.5 * p.shape[-1] ** -0.5))
    if dtype != torch.float64:
        narrow = Transformer(config, dtype=dtype, numerics=numerics).to(dtype)
        narrow.load_state_dict(model.state_dict())
        model = narrow
    return model.requires_grad_(False)


def random_ids(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    """Token ids."""
    rng = random.Random(seed)
    return [rng.randrange(config.vocab_size) for _ in range(length)]
