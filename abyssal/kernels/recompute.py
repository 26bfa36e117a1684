"""recompute: a native kernel's result with the reference's gradients, where a way back of its own would not pay.

The reference runs again on the way back, from what entered; so training has the bits of inference, and keeps no more
than the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, reference: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.reference = reference
        ctx.save_for_backward(*inputs)
        return result.view_as(result)  # an input may not be the output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                x if x is None else x.detach().requires_grad_(need)
                for x, need in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            result = ctx.reference(*leaves)
        used = [x for x in leaves if x is not None and x.requires_grad]
        grads = iter(torch.autograd.grad(result, used, grad))
        return None, None, *(next(grads) if need else None for need in wanted)


def recomputed(result: Tensor, reference: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`result`, as a function of `inputs` with the gradients of `reference(*inputs)`.

    Args:
        result: what the native kernel returned for them.
        reference: must not read what is written later, nor change anything.
    """
    return _Recomputed.apply(result.detach(), reference, *inputs)  # type: ignore[no-untyped-call]
