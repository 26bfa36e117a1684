"""linear: a product with a weight that may lie in FP8 or FP4 (architecture.md 3.3).

The plain meaning: dequantise, then multiply. Large quantised weights are expanded a band of rows at a
time, so that a product needs little memory beside the stored bytes.

The result for a row does not depend on the other rows. Libraries add in another order when there are few
rows or when threads share them unevenly, so rows are filled up to a multiple of `row_unit`, which is found by
trying, once for a process. Where no multiple helps, the product is taken one unit at a time.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.quant.fp4 import dequantise_fp4
from abyssal.quant.fp8 import dequantise_fp8

UNITS = (4, 8, 16, 32, 64)  # rows of which a product may be a multiple
OUTPUTS = 16  # and outputs, of float64 products 64: threads share a ragged edge by another rule
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


def _agrees(unit: int, dtype: torch.dtype) -> bool:
    """Whether products over several multiples of `unit` rows give each row the same bits, wherever it stands."""
    generator = torch.Generator().manual_seed(0)
    for inner, outer in ((24, 64), (256, 192), (1024, 64), (128, 256), (512, 320)):
        x = torch.randn(unit * 40, inner, generator=generator).to(dtype)
        weight = torch.randn(outer, inner, generator=generator).to(dtype)
        want = F.linear(x, weight)
        for units in (1, 2, 3, 5, 17):
            rows = x[: unit * units].clone()
            if not torch.equal(F.linear(rows, weight), want[: unit * units]):
                return False
            if not torch.equal(F.linear(rows.roll(1, 0), weight).roll(-1, 0), want[: unit * units]):
                return False
    return True


@cache
def _unit(dtype: torch.dtype, threads: int) -> tuple[int, bool]:
    """The smallest unit that agrees, and whether one does; torch may split rows among its threads."""
    with torch.inference_mode(False), torch.no_grad():
        found = next((unit for unit in UNITS if _agrees(unit, dtype)), None)
    return found or UNITS[2], found is not None


def row_unit(dtype: torch.dtype) -> int:
    """Rows of which every product is a multiple on this machine; `dtype` is that of the factors."""
    return _unit(dtype, torch.get_num_threads())[0]


def _product(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """The product of a multiple of `row_unit` rows.

    A ragged number of outputs, and an odd number of inputs, are computed by library paths in which the bits of a
    row depend on its place; zeros lead around them.
    """
    outputs, inputs = weight_OI.shape
    spare = -outputs % (OUTPUTS if x_RI.dtype != torch.float64 else 4 * OUTPUTS)
    if spare or inputs % 2:
        weight_OI = F.pad(weight_OI, (0, inputs % 2, 0, spare))
        x_RI = F.pad(x_RI, (0, 1)) if inputs % 2 else x_RI
    unit, agrees = _unit(x_RI.dtype, torch.get_num_threads())
    if agrees or x_RI.device.type != "cpu":
        y_RO = F.linear(x_RI, weight_OI)
    else:
        y_RO = torch.cat([F.linear(part, weight_OI) for part in x_RI.split(unit)])
    return y_RO[:, :outputs].contiguous() if spare else y_RO


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of a stored weight [O, I], in the dtype of `x`."""
    out_features, columns = weight.shape[0], x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    rows = flat.shape[0]
    spare = -rows % row_unit(x.dtype)
    if spare:
        flat = F.pad(flat, (0, 0, 0, spare))
    if scale is None:
        y = _product(flat, weight if weight.dtype == x.dtype else weight.to(x.dtype))
    elif out_features * columns <= BAND_ELEMENTS:
        y = _product(flat, dequantise(weight, scale, x.dtype))
    else:
        band = max(BAND_ELEMENTS // columns // ROW_BLOCK, 1) * ROW_BLOCK
        scale_band = band // ROW_BLOCK if weight.dtype == torch.float8_e4m3fn else band
        parts = zip(weight.split(band), scale.split(scale_band), strict=True)
        y = torch.cat([_product(flat, dequantise(w, s, x.dtype)) for w, s in parts], dim=-1)
    if spare:
        y = y[:rows]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)
