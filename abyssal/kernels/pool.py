"""pool: a softmax over the slots of a block, channel by channel (architecture.md 2.6)."""

from __future__ import annotations

from torch import Tensor


def pool(values_NPC: Tensor, logits_NPC: Tensor) -> Tensor:
    """Weighted sum over the P slots of each block; every channel has a softmax of its own.

    Slots with a logit of minus infinity do not take part; each channel needs one finite slot. Written out,
    because torch's softmax over a middle dimension rounds by the place of a block among the others.

    Returns:
        entries_NC in the dtype of the inputs (float32: 0.01 apart near 8 is one number in bfloat16).
    """
    weights = (logits_NPC - logits_NPC.detach().amax(dim=1, keepdim=True)).exp()
    return (weights * values_NPC).sum(dim=1) / weights.sum(dim=1)
