"""rms_norm: divide by the root mean square of the last dimension (architecture.md 2.2).

Statistics and weight in float32, one cast at the end: casting before the weight is another rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.precision import wide


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise `x [..., D]` and scale it by `weight [D]`, or by nothing.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    x32 = wide(x)
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * wide(weight)
    return normed.to(x.dtype)
