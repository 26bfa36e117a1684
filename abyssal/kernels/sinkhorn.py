"""sinkhorn: make the stream-mixing matrix doubly stochastic (architecture.md 2.3).

The first index of the matrix is the input stream, the second the output stream. The last step is over
the columns, so each output stream is a convex combination of input streams.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SMALL = 256  # up to this many matrices, NumPy's lower cost per call outweighs torch's threads


def sinkhorn_reference(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Softmax over the second index, then alternating column and row steps.

    Args:
        logits_TNN: [T, N, N], float32 or float64; index 1 is the input stream, 2 the output stream.
        iterations: column steps in all; the softmax counts as the first row step.
        eps: added to the softmax and to every sum (architecture.md 2.3; only in the code, not the report).
    """
    mix = logits_TNN.softmax(dim=-1) + eps
    mix = mix / (mix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(dim=-1, keepdim=True) + eps)
        mix = mix / (mix.sum(dim=-2, keepdim=True) + eps)
    return mix


def _sums(mix: Tensor, axis: int) -> Tensor:
    """Sums over one axis of [N, N, T], added in a fixed order so that every T and both libraries agree."""
    rows = mix.unbind(axis)
    total = rows[0] + rows[1]
    for row in rows[2:]:
        total += row
    return total


def _steps(mix: Tensor, iterations: int, eps: float, kept: list[tuple[int, Tensor, Tensor]] | None = None) -> Tensor:
    """Column step, then rows and columns in turn; keeps (axis, divisor, result) for the backward pass."""
    for axis in [0, *(1, 0) * (iterations - 1)]:
        divisor = _sums(mix, axis) + eps
        divisor = divisor if axis == 0 else divisor[:, None]
        mix = mix / divisor
        if kept is not None:
            kept.append((axis, divisor, mix))
    return mix


def _steps_small(mix: NDArray[Any], iterations: int, eps: float) -> NDArray[Any]:
    """The same steps in place, in NumPy, whose calls cost less; below eight rows its sums keep their order."""
    for axis in [0, *(1, 0) * (iterations - 1)]:
        divisor = np.add.reduce(mix, axis, keepdims=True)
        divisor += eps
        mix /= divisor
    return mix


class _Normalise(torch.autograd.Function):
    """The steps with their gradient: for y = x / (sum x + eps), dx = (dy - sum(dy y)) / (sum x + eps)."""

    @staticmethod
    def forward(ctx: Any, mix_NNT: Tensor, iterations: int, eps: float) -> Tensor:
        kept: list[tuple[int, Tensor, Tensor]] = []
        mixed = _steps(mix_NNT, iterations, eps, kept)
        ctx.axes = [axis for axis, _, _ in kept]
        # not as attributes: a node that holds its own output is never freed
        ctx.save_for_backward(*(tensor for _, divisor, result in kept for tensor in (divisor, result)))
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        saved = ctx.saved_tensors
        for step, axis in reversed(list(enumerate(ctx.axes))):
            divisor, result = saved[2 * step : 2 * step + 2]
            shared = _sums(grad * result, axis)
            grad = (grad - (shared if axis == 0 else shared[:, None])) / divisor
        return grad, None, None


def sinkhorn(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """`sinkhorn_reference`, with tokens innermost: whole rows of tokens are added and divided at once.

    The additions are IEEE operations in a fixed order, so NumPy (few tokens) and torch (many, or when a
    gradient is needed) give the same bits.
    """
    if logits_TNN.shape[-1] == 1:
        return sinkhorn_reference(logits_TNN, iterations, eps)
    soft_NNT = (logits_TNN.softmax(dim=-1) + eps).permute(1, 2, 0).contiguous()
    if soft_NNT.requires_grad:
        mixed = _Normalise.apply(soft_NNT, iterations, eps)  # type: ignore[no-untyped-call]
    elif soft_NNT.shape[-1] > SMALL or soft_NNT.shape[0] >= 8 or soft_NNT.device.type != "cpu":
        mixed = _steps(soft_NNT, iterations, eps)
    else:
        mixed = torch.from_numpy(_steps_small(soft_NNT.numpy(), iterations, eps))
    return mixed.permute(2, 0, 1)
