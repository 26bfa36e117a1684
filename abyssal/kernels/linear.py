"""linear: a product with a weight that may lie in FP8 or FP4 (architecture.md 3.3).

The plain meaning: dequantise, then multiply. Large quantised weights are expanded a band of rows at a
time, so that a product needs little memory beside the stored bytes.

The result for a row does not depend on the other rows. Libraries add in another order when there are few
rows, so rows are filled up to a multiple of 16; where even that does not help (`rows_are_independent` asks
this machine once), the product is taken 16 rows at a time.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.quant.fp4 import dequantise_fp4
from abyssal.quant.fp8 import dequantise_fp8

ROWS = 16  # products are taken over a multiple of so many rows
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


@cache
def rows_are_independent(dtype: torch.dtype, threads: int) -> bool:
    """Whether products over 16, 48, ... 1024 rows give each row the same bits, on this machine.

    Args:
        dtype: of the factors.
        threads: of torch; the library may split rows among them.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        for inner, outer in ((24, 61), (256, 96), (1024, 24), (128, 256), (1536, 300)):
            x = torch.randn(1024, inner, generator=generator).to(dtype)
            weight = torch.randn(outer, inner, generator=generator).to(dtype)
            tiles = torch.cat([F.linear(part, weight) for part in x.split(ROWS)])
            for rows in (48, 80, 256, 336, 1024):
                if not torch.equal(F.linear(x[:rows].clone(), weight), tiles[:rows]):
                    return False
    return True


def _product(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """The product of a multiple of 16 rows.

    Fewer than 16 outputs, and an odd number of inputs, are computed by library paths in which the bits of a row
    depend on its place; zeros lead around them.
    """
    outputs, odd = weight_OI.shape[0], weight_OI.shape[1] % 2
    if outputs < ROWS or odd:
        weight_OI = F.pad(weight_OI, (0, odd, 0, max(ROWS - outputs, 0)))
        x_RI = F.pad(x_RI, (0, odd)) if odd else x_RI
    if x_RI.device.type != "cpu" or rows_are_independent(x_RI.dtype, torch.get_num_threads()):
        y_RO = F.linear(x_RI, weight_OI)
    else:
        y_RO = torch.cat([F.linear(part, weight_OI) for part in x_RI.split(ROWS)])
    return y_RO[:, :outputs].contiguous() if outputs < ROWS else y_RO


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of a stored weight [O, I], in the dtype of `x`."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    flat = x.reshape(rows, columns) if x.dim() != 2 else x
    if rows % ROWS:
        flat = F.pad(flat, (0, 0, 0, -rows % ROWS))
    out_features = weight.shape[0]
    if scale is None:
        y = _product(flat, weight if weight.dtype == x.dtype else weight.to(x.dtype))
    elif out_features * columns <= BAND_ELEMENTS:
        y = _product(flat, dequantise(weight, scale, x.dtype))
    else:
        band = max(BAND_ELEMENTS // columns // ROW_BLOCK, 1) * ROW_BLOCK
        scale_band = band // ROW_BLOCK if weight.dtype == torch.float8_e4m3fn else band
        parts = zip(weight.split(band), scale.split(scale_band), strict=True)
        y = torch.cat([_product(flat, dequantise(w, s, x.dtype)) for w, s in parts], dim=-1)
    return (y[:rows] if rows % ROWS else y).view(*x.shape[:-1], out_features)
