"""Which kind of attention a block has (architecture.md 1.2)."""

from __future__ import annotations

from enum import Enum


class LayerKind(Enum):
    """The three kinds; the value is the compression ratio of `compress_ratios`."""

    SWA = 0
    CSA = 4
    HCA = 128

    @classmethod
    def of(cls, ratio: int) -> LayerKind:
        """The kind with this compression ratio.

        Raises:
            ValueError: V4 has no such ratio.
        """
        return cls(ratio)


RATIOS = tuple(kind.value for kind in LayerKind)
