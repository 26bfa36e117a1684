"""RMSNorm with a learned weight (architecture.md 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Normalise the last dimension; the weight multiplies in float32, before the cast back."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], same dtype."""
        return rms_norm(x, self.weight, self.eps)
