"""rotary: turn the last R dimensions of each vector by its position (architecture.md 2.5).

Dimensions (2i, 2i+1) of the slice are one complex number, multiplied by exp(i * position * f_i):
interleaved pairs, not halves. The inverse is the conjugate.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from abyssal.kernels.choice import learning, native_for
from abyssal.kernels.recompute import recomputed
from abyssal.kernels.rms_norm import rms_norm_reference
from abyssal.quant.precision import wide


def rotations(frequencies_R: Tensor, positions: Tensor) -> Tensor:
    """Unit complex numbers exp(i * position * f) for every position and pair.

    Args:
        frequencies_R: radians per token, one for each pair, float32 or float64.
        positions: integer positions, any shape.
    Returns:
        complex tensor [*positions.shape, R/2] whose precision is that of the frequencies.
    """
    angles = positions.unsqueeze(-1).to(frequencies_R.dtype) * frequencies_R
    return torch.polar(torch.ones_like(angles), angles)


def rotate_tail_reference(x: Tensor, turn: Tensor, inverse: bool = False) -> Tensor:
    """The plain meaning; `turn` broadcasts against the pairs of `x`."""
    rope_dim = 2 * turn.shape[-1]
    plain, tail = x[..., :-rope_dim], wide(x[..., -rope_dim:])
    pairs = torch.view_as_complex(tail.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * (turn.conj() if inverse else turn)).flatten(-2)
    return torch.cat([plain, turned.to(x.dtype)], dim=-1)


def _takes(x: Tensor, turn: Tensor) -> bool:
    """Whether neighbouring rows of `x` share one rotation each, as many for each."""
    if turn.dtype is not torch.complex64 or turn.is_conj() or turn.requires_grad:
        return False
    lead, own = x.shape[:-1], turn.shape[:-1]
    while own and own[-1] == 1:
        own = own[:-1]
    return len(turn.shape) == len(x.shape) and lead[: len(own)] == own and 0 < turn.shape[-1] <= x.shape[-1] // 2


def rotate_tail(x: Tensor, turn: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last dimensions of `x [..., C]` by `turn [..., R/2]`, which broadcasts against it.

    Args:
        inverse: turn back, by the conjugate.
    Returns:
        A new tensor of the dtype of `x`; the first C - R dimensions are copied.
    """
    fast = native_for(x, backward=True)
    if fast is None or not _takes(x, turn):
        return rotate_tail_reference(x, turn, inverse)
    dense = x.detach().contiguous()
    y = torch.empty_like(dense)
    fast.norm(dense, False, None, 0.0, turn.contiguous(), inverse, y)
    return recomputed(y, lambda x: rotate_tail_reference(x, turn, inverse), x) if learning(x) else y


def _norm_and_rotate_reference(x: Tensor, weight: Tensor | None, eps: float, turn: Tensor) -> Tensor:
    return rotate_tail_reference(rms_norm_reference(x, weight, eps), turn)


def norm_and_rotate(x: Tensor, weight: Tensor | None, eps: float, turn: Tensor) -> Tensor:
    """`rms_norm`, then `rotate_tail`."""
    fast = native_for(x, weight, backward=True)
    if fast is None or not _takes(x, turn):
        return _norm_and_rotate_reference(x, weight, eps, turn)
    dense = x.detach().contiguous()
    y = torch.empty_like(dense)
    fast.norm(dense, True, weight, eps, turn.contiguous(), False, y)
    if not learning(x, weight):
        return y
    return recomputed(y, partial(_norm_and_rotate_reference, eps=eps, turn=turn), x, weight)
