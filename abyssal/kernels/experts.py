"""experts: a token's routed experts and the shared one, with clamp and routing weights, summed (architecture.md 2.10).

Each expert is w2 (swiglu(w1 x, w3 x) * gain). A token adds its experts in rising order of their numbers, then the
shared one, in float32. Native: one call for all tokens and experts, and every product as `linear` computes it. The
way back is one call too; it adds in an order that depends on the rows of an expert alone (fast/cpu/ops/outer.hpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abyssal.kernels.choice import learning, native_for
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


def _handle(fast: ModuleType, weight: Packed | Stored) -> Any:
    return weight.handle if isinstance(weight, Packed) else stored_weight(fast, *weight)


def _run(
    fast: ModuleType,
    x_TD: Tensor,
    gains_TK: Tensor,
    chosen_TK: Tensor,
    routed: Sequence[Packed | Stored],
    shared: Sequence[Packed | Stored],
    numbers: tuple[float, int],
    kept: tuple[Tensor, ...] | None = None,
) -> Tensor:
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    w1, w3, w2 = (_handle(fast, weight) for weight in routed)
    three = tuple(_handle(fast, weight) for weight in shared) or None
    fast.experts(
        w1, w3, w2, three, x_TD.contiguous(), gains_TK.contiguous(), chosen_TK.contiguous(), *numbers, y_TD, kept
    )
    return y_TD


class _Experts(torch.autograd.Function):
    """`_run` for float32 weights where a gradient is needed; keeps what enters the activations."""

    @staticmethod
    def forward(
        ctx: Any,
        fast: ModuleType,
        numbers: tuple[float, int],
        chosen_TK: Tensor,
        x_TD: Tensor,
        gains_TK: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        tokens = x_TD.contiguous(), gains_TK.contiguous(), chosen_TK.contiguous()
        weights = tuple(w.contiguous() for w in weights)
        kept = tuple(
            x_TD.new_empty(rows, first.shape[-2])
            for rows, first in zip((chosen_TK.numel(), len(x_TD)), weights[::3], strict=False)
            for _ in range(2)
        )
        ctx.fast, ctx.numbers = fast, numbers
        ctx.save_for_backward(*tokens, *kept, *weights)
        stored = [(w, None) for w in weights]
        return _run(fast, *tokens, stored[:3], stored[3:], numbers, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gains_TK, chosen_TK, *rest = ctx.saved_tensors
        sets = len(rest) // 5  # the routed experts, and the shared one if there is one
        kept, weights = rest[: 2 * sets], rest[2 * sets :]
        dx_TD, dgains_TK = torch.empty_like(x_TD), torch.empty_like(gains_TK)
        grads = [torch.empty_like(w) for w in weights]
        held, found = ([w.view(-1, *w.shape[-2:]) for w in matrices] for matrices in (weights, grads))
        routed, *shared = (
            (*held[3 * i : 3 * i + 3], *kept[2 * i : 2 * i + 2], *found[3 * i : 3 * i + 3]) for i in range(sets)
        )
        own = shared[0] if shared else None
        tokens = x_TD, gains_TK, chosen_TK
        ctx.fast.experts_backward(routed, own, *tokens, *ctx.numbers, dy_TD.contiguous(), dx_TD, dgains_TK)
        return None, None, None, dx_TD, dgains_TK, *grads


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

    Gradients flow to x, gains and weights where all weights are float32 and not packed.

    Args:
        gains_TK, chosen_TK: weights and numbers of each token's experts.
        routed: w1, w3 and w2 of all experts, stacked. shared: those of the shared expert, or none.
        block: values that share a scale where the input of a product is rounded to FP8; 0 for no rounding.
            Gradients pass the rounding as they are.
    """
    fast = native_for(x_TD, gains_TK, backward=True)
    tensors = [w for w in (*routed, *shared) if isinstance(w, tuple)]
    if fast is None or any(format_of(*w) is None for w in tensors):
        return None
    if not learning(x_TD, gains_TK, *(w for w, _ in tensors)):
        return _run(fast, x_TD, gains_TK, chosen_TK, routed, shared, (limit, block))
    if len(tensors) < len(routed) + len(shared) or any(w.dtype != torch.float32 for w, _ in tensors):
        return None
    weights = (w for w, _ in tensors)
    return _Experts.apply(fast, (limit, block), chosen_TK, x_TD, gains_TK, *weights)  # type: ignore[no-untyped-call]
