"""Experts kept in balance without a loss: the router's bias moves against overload (training.md 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.model.moe import Gate


def max_violation(loads_E: Tensor) -> float:
    """How far the busiest expert lies above the mean, as a share of it; 0 for no tokens."""
    mean = float(loads_E.double().mean())
    return float(loads_E.max()) / mean - 1 if mean else 0.0


@torch.no_grad()
def move_bias(gate: Gate, loads_E: Tensor, speed: float) -> None:
    """Raise the bias of experts below the mean load by `speed`, and lower that of those above.

    Args:
        gate: a router; one that chooses by the token's id has no bias and stays as it is.
        loads_E: tokens that each expert got in the global batch.
        speed: the step.
    """
    if gate.bias is not None:
        # in integers: the mean of whole numbers is compared without rounding
        over_E = loads_E * len(loads_E) - loads_E.sum()
        gate.bias.sub_(over_E.sign().to(gate.bias.dtype), alpha=speed)
