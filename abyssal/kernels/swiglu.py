"""swiglu: the clamped gated activation of every expert (architecture.md 2.10)."""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.choice import native_for
from abyssal.kernels.sigmoid import sigmoid
from abyssal.quant.precision import wide


def swiglu_reference(gate: Tensor, up: Tensor, limit: float, gains: Tensor | None = None) -> Tensor:
    """The plain meaning."""
    gate = wide(gate).clamp(max=limit)
    activated = gate * sigmoid(gate) * wide(up).clamp(-limit, limit)
    return activated if gains is None else activated * gains.unsqueeze(-1)


def swiglu(gate: Tensor, up: Tensor, limit: float, gains: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * gains, in float32 (float64 for float64).

    Args:
        gate, up: [..., F].
        gains: [...], a factor for each row; None for 1.
    """
    if (fast := native_for(gate, up, gains)) is None:
        return swiglu_reference(gate, up, limit, gains)
    y = torch.empty(gate.shape)
    rows = gate.shape[:-1].numel()
    flat = (t.contiguous().view(rows, gate.shape[-1]) for t in (gate, up))
    fast.swiglu(*flat, None if gains is None else gains.contiguous().view(-1), limit, y.view(rows, gate.shape[-1]))
    return y
