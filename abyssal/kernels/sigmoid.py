"""sigmoid: the logistic function, with the same bits at every place of a tensor.

torch's own computes the last few elements of a tensor by another formula than the rest, so a value would
depend on how many there are. Its `exp` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = -80.0  # exp(80) is finite in float32; below, the function is under 2e-35


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) for float32 and float64, same shape."""
    return torch.reciprocal(x.clamp(min=LOWEST).neg().exp() + 1)
