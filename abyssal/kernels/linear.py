"""linear: a product with a weight that may lie in FP8 or FP4 (architecture.md 3.3).

The plain meaning: dequantise, then multiply. Large quantised weights are expanded a band of rows at a
time, so that a product needs little memory beside the stored bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.quant.fp4 import dequantise_fp4
from abyssal.quant.fp8 import dequantise_fp8

ROW_BLOCK = 128  # rows that share a row of FP8 scales
BAND_ELEMENTS = 1 << 24  # 64 MiB of float32: the expanded part of a quantised weight


def dequantise(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values of a stored weight.

    Args:
        weight: [O, I] float, or float8_e4m3fn with scale [O/128, I/128], or packed FP4 (int8/uint8)
            [O, I/2] with scale [O, I/32].
        scale: the block scales, or None for a float weight.
    """
    if scale is None:
        return weight.to(dtype)
    if weight.dtype == torch.float8_e4m3fn:
        return dequantise_fp8(weight, scale, dtype)
    return dequantise_fp4(weight, scale, dtype)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of a stored weight [O, I], in the dtype of `x`."""
    if scale is None:
        return F.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype))
    rows, columns = weight.shape[0], x.shape[-1]
    if rows * columns <= BAND_ELEMENTS:
        return F.linear(x, dequantise(weight, scale, x.dtype))
    band = max(BAND_ELEMENTS // columns // ROW_BLOCK, 1) * ROW_BLOCK
    scale_band = band // ROW_BLOCK if weight.dtype == torch.float8_e4m3fn else band
    parts = zip(weight.split(band), scale.split(scale_band), strict=True)
    return torch.cat([F.linear(x, dequantise(w, s, x.dtype)) for w, s in parts], dim=-1)
