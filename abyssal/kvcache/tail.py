"""Tokens that do not fill a compressed block yet (architecture.md 2.6, 2.9).

A CSA block pools its own M tokens and the M tokens of the block before it: the first half of the channels
plays the part of the previous block, the second half that of the current one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TailSnapshot:
    """A copy of a tail: the unfinished tokens and the previous block."""

    blocks: int
    values: Tensor
    logits: Tensor
    previous: tuple[Tensor, Tensor] | None


class Tail:
    """Projected values and gate logits waiting for their block to fill.

    Args:
        batch: sequences in lockstep.
        block: tokens of a block, M.
        channels: channels of a pooled entry, C; CSA projects to 2 C.
        overlap: True for CSA.
        dtype: of the projections, float32 or float64.
    """

    def __init__(
        self,
        batch: int,
        block: int,
        channels: int,
        overlap: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        self.block = block
        self.channels = channels
        self.blocks = 0
        self.count = 0
        width = 2 * channels if overlap else channels
        self._values = torch.zeros(batch, block, width, dtype=dtype, device=device)
        self._logits = torch.zeros_like(self._values)
        self._previous: tuple[Tensor, Tensor] | None = None
        if overlap:
            # the block before the first one: no value, and no share in the softmax
            absent = torch.zeros(batch, block, channels, dtype=dtype, device=device)
            self._previous = (absent, torch.full_like(absent, float("-inf")))

    def push(self, values_BSW: Tensor, logits_BSW: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add S tokens.

        Args:
            values_BSW: projected values, W = C or 2 C channels.
            logits_BSW: gate logits with the position bias already added.
        Returns:
            Slots (values, logits) of the N blocks that are full now, [B, N, M or 2M, C], or None.
        """
        if values_BSW.shape[1] == 1 and not values_BSW.requires_grad and not self._values.requires_grad:
            self._values[:, self.count] = values_BSW[:, 0]
            self._logits[:, self.count] = logits_BSW[:, 0]
            self.count += 1
            if self.count < self.block:
                return None
            full = 1
            values, logits = self._values.unsqueeze(1), self._logits.unsqueeze(1)
            self.count = 0
        else:
            values_BSW = torch.cat([self._values[:, : self.count], values_BSW], dim=1)
            logits_BSW = torch.cat([self._logits[:, : self.count], logits_BSW], dim=1)
            full, self.count = divmod(values_BSW.shape[1], self.block)
            self._values = self._padded(values_BSW[:, full * self.block :])
            self._logits = self._padded(logits_BSW[:, full * self.block :])
            if not full:
                return None
            values = values_BSW[:, : full * self.block].unflatten(1, (full, self.block))
            logits = logits_BSW[:, : full * self.block].unflatten(1, (full, self.block))
        self.blocks += full
        if self._previous is None:
            return values, logits
        before = self._previous
        C = self.channels
        self._previous = (values[:, -1, :, :C].clone(), logits[:, -1, :, :C].clone())
        return self._overlapped(before[0], values), self._overlapped(before[1], logits)

    def _overlapped(self, before_BMC: Tensor, blocks_BNMW: Tensor) -> Tensor:
        previous = torch.cat([before_BMC.unsqueeze(1), blocks_BNMW[:, :-1, :, : self.channels]], dim=1)
        return torch.cat([previous, blocks_BNMW[..., self.channels :]], dim=2)

    def _padded(self, rest: Tensor) -> Tensor:
        buffer = rest.new_zeros(rest.shape[0], self.block, rest.shape[2])
        buffer[:, : rest.shape[1]] = rest
        return buffer

    def snapshot(self) -> TailSnapshot:
        """A copy that later pushes do not change."""
        return TailSnapshot(
            self.blocks,
            self._values[:, : self.count].clone(),
            self._logits[:, : self.count].clone(),
            self._previous,  # never written in place
        )

    def restore(self, snapshot: TailSnapshot) -> None:
        """Go back to a snapshot."""
        self.blocks = snapshot.blocks
        self.count = snapshot.values.shape[1]
        self._values = self._padded(snapshot.values)
        self._logits = self._padded(snapshot.logits)
        self._previous = snapshot.previous

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, which are fixed."""
        tensors = [self._values, self._logits, *(self._previous or ())]
        return sum(t.numel() * t.element_size() for t in tensors)
