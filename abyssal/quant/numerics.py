"""Which of the reference's simulated quantisations a model performs (architecture.md 3.6, design.md 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["exact", "fake", "packed"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The switches of section 3.6, one for each row of its table.

    Attributes:
        activations: round the inputs of FP8 and FP4 linears to FP8 (blocks of 128 along the input).
        entries: window and compressed entries: kept as computed, rounded to FP8/bfloat16, or stored packed.
        index: Hadamard and FP4 on indexer queries and keys: off, simulated, or with packed keys.
    """

    activations: bool = False
    entries: Mode = "exact"
    index: Mode = "exact"

    @classmethod
    def of(cls, mode: Mode) -> Numerics:
        """All switches of one mode.

        Raises:
            ValueError: `mode` is not one of `MODES`.
        """
        if mode not in MODES:
            raise ValueError(f"unknown numerics mode {mode!r}: choose from {', '.join(MODES)}")
        return cls(activations=mode != "exact", entries=mode, index=mode)
