"""rms_norm: divide by the root mean square of the last dimension (architecture.md 2.2).

Statistics and weight in float32, one cast at the end: casting before the weight is another rounding.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from abyssal.kernels.choice import learning, native_for
from abyssal.kernels.recompute import recomputed
from abyssal.quant.precision import wide


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x ** 2) + eps) over the last dimension, which stays with size 1.

    A sum and a factor: torch's `mean` takes twice as long on a few rows.
    """
    return torch.rsqrt(x.square().sum(-1, keepdim=True) * (1 / x.shape[-1]) + eps)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The plain meaning."""
    x32 = wide(x)
    normed = x32 * inverse_rms(x32, eps)
    if weight is not None:
        normed = normed * wide(weight)
    return normed.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise `x [..., D]` and scale it by `weight [D]`, or by nothing.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    if (fast := native_for(x, weight, backward=True)) is None:
        return rms_norm_reference(x, weight, eps)
    dense = x.detach().contiguous()
    y = torch.empty_like(dense)
    fast.norm(dense, True, weight, eps, None, False, y)
    return recomputed(y, partial(rms_norm_reference, eps=eps), x, weight) if learning(x, weight) else y
