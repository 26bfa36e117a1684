"""The Walsh-Hadamard transform of the indexer (architecture.md 2.7)."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Sylvester-ordered transform of the last dimension, times its length ** -0.5; its own inverse.

    Raises:
        ValueError: the last dimension is not a power of two.
    """
    size = x.shape[-1]
    if size & (size - 1) or not size:
        raise ValueError(f"a Hadamard transform needs a power of two, got {size} values")
    # seven steps in bfloat16 would round seven times
    out, half = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, 1
    while half < size:
        pairs = out.unflatten(-1, (-1, 2, half))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    return (out * size**-0.5).to(x.dtype)
