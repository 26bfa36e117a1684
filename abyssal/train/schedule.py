"""What changes over a run: rates, weights of losses, selection, precision (training.md 1, 3, 8.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Functions of the number of the step, 0 for the first.

    Attributes:
        steps: of the run.
        warmup: steps in which the rate rises in a line; the last of them has the peak.
        decay_from: share of the steps behind which the rate falls along a cosine.
        end: rate at the end, as a share of the peak; the released runs end at a tenth.
        mtp: weight of the MTP loss before and after the rate begins to fall.
        bias_speed: of the router's bias in the first and in the last half; the released 0.001 is slow for small
            batches.
        dense_until: share of the steps in which CSA layers read all blocks, and sparse selection after it.
        fp4_from, fp8_from: share of the steps from which experts are FP4, and all weights as released.
    """

    steps: int
    warmup: int = 50
    decay_from: float = 0.7
    end: float = 0.1
    mtp: tuple[float, float] = (0.3, 0.1)
    bias_speed: tuple[float, float] = (0.005, 0.001)
    dense_until: float = 0.6
    fp4_from: float = 0.8
    fp8_from: float = 0.9

    def falling(self, step: int) -> float:
        """How far the rate's fall has come, 0 before it and 1 at the last step."""
        first = self.decay_from * (self.steps - 1)
        return min(max((step - first) / max(self.steps - 1 - first, 1e-9), 0.0), 1.0)

    def rate(self, step: int) -> float:
        """The learning rate as a share of its peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * self.falling(step))) / 2

    def mtp_weight(self, step: int) -> float:
        """Weight of the MTP loss."""
        return self.mtp[1 if self.falling(step) > 0 else 0]

    def bias_step(self, step: int) -> float:
        """How far the router's bias moves."""
        return self.bias_speed[1 if 2 * step >= self.steps else 0]

    def dense(self, step: int) -> bool:
        """Whether CSA layers read all blocks."""
        return step < self.dense_until * self.steps

    def formats(self, step: int) -> frozenset[str]:
        """Formats in which weights are rounded; see `quantised`."""
        if step >= self.fp8_from * self.steps:
            return frozenset({"fp4", "fp8", "plain"})
        return frozenset({"fp4"}) if step >= self.fp4_from * self.steps else frozenset()
