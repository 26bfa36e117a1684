"""rotary: turn the last R dimensions of each vector by its position (architecture.md 2.5).

Dimensions (2i, 2i+1) of the slice are one complex number, multiplied by exp(i * position * f_i):
interleaved pairs, not halves. The inverse is the conjugate.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def rotate_tail(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the last dimensions of `x [..., C]` by `turn [..., R/2]`, which broadcasts against it.

    Returns:
        A new tensor of the dtype of `x`; the first C - R dimensions are copied.
    """
    rope_dim = 2 * turn.shape[-1]
    plain, tail = x[..., :-rope_dim], wide(x[..., -rope_dim:])
    pairs = torch.view_as_complex(tail.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat([plain, turned.to(x.dtype)], dim=-1)
