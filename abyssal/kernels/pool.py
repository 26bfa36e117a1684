"""pool: a softmax over the slots of a block, channel by channel (architecture.md 2.6)."""

from __future__ import annotations

from types import ModuleType

import torch
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


def compress(
    module: ModuleType,
    values_TW: Tensor,
    logits_TW: Tensor,
    ape_MW: Tensor,
    spans: Tensor,
    rings: tuple[Tensor, Tensor, int],
    norm_C: Tensor,
    eps: float,
    turn_NR: Tensor,
    store: tuple[Tensor, Tensor, int] | None,
) -> Tensor:
    """A compressor's step by the native kernels: place bias, pooling, norm, rotary; adds the tokens to the rings.

    Args:
        module: the native kernels.
        values_TW, logits_TW: projected tokens; W is C, or 2 C for blocks that overlap (architecture.md 2.6).
        ape_MW: what is added to the logits at each place of a block of M tokens.
        spans: [G, 6], see `attention.Window`.
        rings: of values and logits, and the places of a slot.
        norm_C, eps: of the entries' norm.
        turn_NR: complex rotations at the first token of each block that the tokens complete, in their order.
        store: where entries go that are not known already: float32 rows, tables [G, P] of pages, blocks of a page;
            None if they must be packed first.
    Returns:
        entries_NC.
    """
    out = values_TW.new_empty(len(turn_NR), len(norm_C))
    values, logits, size = rings
    entries, tables, per_page = store or (None, None, 1)
    turn = torch.view_as_real(turn_NR)
    module.compress(
        values_TW, logits_TW, ape_MW, spans, values, logits, size, norm_C, eps, turn, entries, tables, per_page, out
    )
    return out
