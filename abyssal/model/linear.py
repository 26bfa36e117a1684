"""Linear layers whose weight may stay in FP8, and the grouped one of the output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from abyssal.kernels.linear import dequantise, linear
from abyssal.quant.fp8 import fake_fp8
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide

ACTIVATION_BLOCK = 128


class Linear(nn.Module):
    """y = x W^T without a bias.

    Attributes:
        weight: [O, I], float, or FP8 with `scale`.
        scale: block scales of a quantised weight, else None.
    """

    scale: Tensor | None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the dtype of x."""
        return linear(x, self.weight, self.scale)


class WideLinear(Linear):
    """A product in float32: the compressor's projections and the router (architecture.md 2.6, 2.10)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in float32 (float64 for float64)."""
        return linear(wide(x), self.weight, self.scale)


class QuantLinear(Linear):
    """A linear that the checkpoint stores in FP8: its input is rounded to FP8 when the numerics ask."""

    def __init__(self, in_features: int, out_features: int, numerics: Numerics):
        super().__init__(in_features, out_features)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the dtype of x."""
        if self.numerics.activations:
            x = fake_fp8(x, ACTIVATION_BLOCK)
        return super().forward(x)


class GroupedLinear(Linear):
    """G independent products, one for each group of inputs (wo_a; its input is never rounded)."""

    def __init__(self, in_features: int, out_features: int, groups: int):
        super().__init__(in_features, out_features)
        self.groups = groups

    def forward(self, x_TGI: Tensor) -> Tensor:
        """x [T, G, I] -> [T, G * O/G]."""
        weight = dequantise(self.weight, self.scale, x_TGI.dtype).unflatten(0, (self.groups, -1))
        return torch.einsum("tgi,goi->tgo", x_TGI, weight).flatten(1)
