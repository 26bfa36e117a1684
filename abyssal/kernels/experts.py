"""experts: a token's routed experts and the shared one, with clamp and routing weights, summed (architecture.md 2.10).

Each expert is w2 (swiglu(w1 x, w3 x) * gain). A token adds its experts in rising order of their numbers, then the
shared one, in float32. Native: one call for all tokens and experts, and every product as `linear` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from abyssal.kernels.choice import native_for
from abyssal.kernels.packed import Packed, format_of, stored_weight
from abyssal.kernels.swiglu import swiglu_reference

Stored = tuple[Tensor, Tensor | None]  # a weight and its block scales


def experts_reference(
    x_TD: Tensor, gains_TK: Tensor, chosen_TK: Tensor, weights: Sequence[Tensor], shared: Sequence[Tensor], limit: float
) -> Tensor:
    """The plain meaning for float weights: w1, w3 [E, F, D] and w2 [E, D, F]; of the shared expert without E."""
    y_TD = x_TD.new_zeros(x_TD.shape)
    for t, x in enumerate(x_TD):
        for number, gain in sorted(zip(chosen_TK[t].tolist(), gains_TK[t], strict=True), key=lambda pair: pair[0]):
            w1, w3, w2 = (weight[number] for weight in weights)
            y_TD[t] += w2 @ (swiglu_reference(w1 @ x, w3 @ x, limit) * gain)
        if shared:
            w1, w3, w2 = shared
            y_TD[t] += w2 @ swiglu_reference(w1 @ x, w3 @ x, limit)
    return y_TD


def fused_experts(
    x_TD: Tensor,
    gains_TK: Tensor,
    chosen_TK: Tensor,
    routed: Sequence[Packed | Stored],
    shared: Sequence[Packed | Stored],
    limit: float,
    block: int,
) -> Tensor | None:
    """All of it natively, or None where the caller has to go through `linear` and `swiglu`.

    Args:
        gains_TK, chosen_TK: weights and numbers of each token's experts.
        routed: w1, w3 and w2 of all experts, stacked. shared: those of the shared expert, or none.
        block: values that share a scale where the input of a product is rounded to FP8; 0 for no rounding.
    """
    tensors = [w for w in (*routed, *shared) if isinstance(w, tuple)]
    fast = native_for(x_TD, gains_TK)
    if fast is None or any(format_of(*w) is None or (torch.is_grad_enabled() and w[0].requires_grad) for w in tensors):
        return None

    def handle(weight: Packed | Stored) -> Any:
        return weight.handle if isinstance(weight, Packed) else stored_weight(fast, *weight)

    w1, w3, w2 = map(handle, routed)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    three = tuple(map(handle, shared)) or None
    fast.experts(
        w1, w3, w2, three, x_TD.contiguous(), gains_TK.contiguous(), chosen_TK.contiguous(), limit, block, y_TD
    )
    return y_TD
