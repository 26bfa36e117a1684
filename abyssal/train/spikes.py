"""Loss spikes: when to skip a step, and when to go back (training.md 3.5)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from enum import Enum
from typing import Any


class Verdict(Enum):
    """What to do with a step whose loss and gradient are known and which is not applied yet."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class SpikeWatch:
    """Compares each loss with those of the last steps.

    Steps far above them do not enter the comparison, so that a spike cannot raise the bar for itself.

    Args:
        window: steps to compare with; until there are so many, only what is not finite counts.
        sigmas: standard deviations above the mean at which a loss is far.
        patience: far steps in a row that make a spike.
    """

    def __init__(self, window: int = 200, sigmas: float = 6.0, patience: int = 3):
        self.window, self.sigmas, self.patience = window, sigmas, patience
        self.losses: list[float] = []
        self.far = 0

    def judge(self, loss: float, norm: float) -> Verdict:
        """Judge a step, and remember it.

        Args:
            loss: of the step.
            norm: of its gradient, before clipping.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Verdict.SKIP
        if len(self.losses) == self.window:
            bar = statistics.fmean(self.losses) + self.sigmas * statistics.pstdev(self.losses)
            if loss > bar:
                self.far += 1
                if self.far < self.patience:
                    return Verdict.APPLY
                self.far = 0
                return Verdict.ROLL_BACK
        self.far = 0
        self.losses = [*self.losses[-(self.window - 1) :], loss]
        return Verdict.APPLY

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as JSON can hold it."""
        return {"losses": self.losses, "far": self.far}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.losses, self.far = list(state["losses"]), int(state["far"])
