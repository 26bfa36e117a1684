"""Rotary frequencies: plain for window-only layers, YaRN for compressed ones (architecture.md 2.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abyssal.arch.config import ModelConfig, RopeScaling
from abyssal.kernels.rotary import rotations
from abyssal.quant.precision import wide_dtype


def _yarn(frequencies: list[float], base: float, rope_dim: int, yarn: RopeScaling) -> list[float]:
    """Slow pairs are divided by the factor, fast ones kept, a linear ramp between (YaRN, no amplitude)."""

    def pair_that_turns(times: float) -> float:
        context = yarn.original_max_position_embeddings
        return rope_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), rope_dim - 1)
    width = max(high - low, 1e-3)  # the official guard against an empty ramp
    scaled = []
    for i, frequency in enumerate(frequencies):
        ramp = min(max((i - low) / width, 0.0), 1.0)
        scaled.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return scaled


def frequencies(config: ModelConfig, ratio: int) -> list[float]:
    """Radians per token of each rotated pair in a layer of this ratio, qk_rope_head_dim / 2 values.

    One table serves the whole layer: queries, window and compressed entries, indexer and de-rotation.
    """
    rope_dim = config.qk_rope_head_dim
    base = config.compress_rope_theta if ratio else config.rope_theta
    plain = [base ** (-2 * i / rope_dim) for i in range(rope_dim // 2)]
    if ratio == 0 or config.rope_scaling is None:
        return plain
    return _yarn(plain, base, rope_dim, config.rope_scaling)


class Rope:
    """The rotations of one kind of layer, in float32 (float64 for a float64 model).

    Args:
        config: the model's numbers.
        ratio: 0 for the window-only table, anything else for the compressed layers' table.
        dtype: the model's activation dtype.
    """

    def __init__(self, config: ModelConfig, ratio: int, dtype: torch.dtype):
        # on the CPU even where the model is being built on the meta device
        self.frequencies = torch.tensor(frequencies(config, ratio), dtype=wide_dtype(dtype), device="cpu")

    def at(self, positions: Tensor) -> Tensor:
        """Complex rotations for positions of any shape, [*positions.shape, R/2]."""
        return rotations(self.frequencies.to(positions.device), positions)
