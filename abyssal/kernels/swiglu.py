"""swiglu: the clamped gated activation of every expert (architecture.md 2.10)."""

from __future__ import annotations

from torch import Tensor

from abyssal.kernels.sigmoid import sigmoid
from abyssal.quant.precision import wide


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in float32 (float64 for float64)."""
    gate = wide(gate).clamp(max=limit)
    return gate * sigmoid(gate) * wide(up).clamp(-limit, limit)
