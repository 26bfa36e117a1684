"""Who takes part in a run: one process here, several in `abyssal.train.parallel` (training.md 7).

The trainer asks its world wherever processes would have to talk. In a world of one, nothing is copied and no bit is
other than without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from abyssal.model import Transformer
from abyssal.train import checkpoint
from abyssal.train.checkpoint import KEPT, Saved

T = TypeVar("T")


def is_spread(x: Tensor) -> bool:
    """Whether processes hold parts of a tensor: it is a DTensor, whose module takes seconds to import."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of one that is not spread."""
    return x.to_local() if is_spread(x) else x  # type: ignore[attr-defined]


class World:
    """This process alone.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where the parameters lie, as torch names it.
    """

    rank = 0
    size = 1
    device = "cpu"

    def spread(self, model: Transformer) -> None:
        """Give each process its part of the parameters."""

    def inside(self, work: Callable[[], T]) -> T:
        """Run a pass; parameters of blocks are whole while a block runs, the others until the way back has ended."""
        return work()

    def share(self, passes: Sequence[T]) -> Sequence[T]:
        """Those passes of a step that this process runs."""
        return passes

    def settle(self, longest: int) -> None:
        """Drop gradients of what no sequence of the step has reached; they are there on several processes alone.

        Args:
            longest: tokens of the longest sequence: a compressor with longer blocks has pooled none.
        """

    def sum(self, x: Tensor) -> Tensor:
        """A sum over all processes, the same bits on each."""
        return x

    def any(self, here: bool) -> bool:
        """Whether something holds on any process."""
        return here

    def first(self, value: T) -> T:
        """What process 0 has."""
        return value

    def clip(self, params: Sequence[nn.Parameter], limit: float) -> float:
        """Scale gradients down to a norm over all processes; the norm before."""
        return float(nn.utils.clip_grad_norm_(params, limit)) if params else 0.0

    def gather(self, parts: Mapping[str, Tensor], of: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Whole matrices out of the processes' rows, each on one of them; stacks of whole matrices stay.

        Args:
            parts: this process's part of each.
            of: parameters of the same names, spread in the same way.
        Returns:
            those that are whole here.
        """
        del of
        return dict(parts)

    def scatter(self, wholes: Mapping[str, Tensor], of: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The way back: this process's part of each parameter in `of`."""
        del of
        return dict(wholes)

    def end(self) -> None:
        """Called where a program has done its work and closed what it opened; alone it ends as any other."""

    def save(self, run: Path, step: int, saved: Saved, kept: int = KEPT) -> Path:
        """See `checkpoint.save`."""
        return checkpoint.save(run, step, saved, kept)

    def load(self, folder: Path, like: Saved) -> Saved:
        """See `checkpoint.load`.

        Args:
            folder: of a checkpoint that any number of processes wrote.
            like: tensors spread as those to return shall be.
        """
        del like
        return checkpoint.load(folder)
