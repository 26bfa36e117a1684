"""pool: a softmax over the slots of a block, channel by channel (architecture.md 2.6)."""

from __future__ import annotations

from torch import Tensor


def pool(values_BNPC: Tensor, logits_BNPC: Tensor) -> Tensor:
    """Weighted sum over the P slots of each block; every channel has a softmax of its own.

    Slots with a logit of minus infinity do not take part; each channel needs one finite slot.

    Returns:
        entries_BNC in the dtype of the inputs (float32: 0.01 apart near 8 is one number in bfloat16).
    """
    return (logits_BNPC.softmax(dim=2) * values_BNPC).sum(dim=2)
