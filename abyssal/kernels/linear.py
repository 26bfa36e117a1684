"""linear: a product with a weight that may lie in FP8 or FP4 (architecture.md 3.3).

The plain meaning: dequantise, then multiply. The result for a row does not depend on the other rows, nor on the
number of threads, and gradients flow to `x` and to a float weight.

Native kernels (fast/cpu/ops/product.hpp) add in one fixed order, whatever the number of rows, so they keep the
promise by construction. They take float32 and bfloat16 activations. Their error: with I inputs, each sum is a chain
of 32 steps and one of I / 32, so |error| <= gamma(33 + I / 32) * sum |x w| with gamma(n) = n u / (1 - n u), and one
rounding to the result's type.

The reference multiplies by torch. Large quantised weights are expanded a band of rows at a time, so that a product
needs little memory beside the stored bytes. Libraries add in another order when there are few rows or when threads
share them unevenly, so rows are filled up to a multiple of `row_unit`, which is found by trying, once for a process.
Where no multiple helps, the product is taken one unit at a time.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.kernels.choice import native
from abyssal.kernels.packed import Packed, format_of, stored_weight
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


def linear_reference(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of a stored weight [O, I], in the dtype of `x`."""
    out_features, columns = weight.shape[0], x.shape[-1]
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    rows = flat.shape[0]
    spare = -rows % row_unit(x.dtype)
    if spare:
        flat = F.pad(flat, (0, 0, 0, spare))
    if scale is None and weight.dtype == x.dtype:
        y = _product(flat, weight)
    elif out_features * columns <= BAND_ELEMENTS:
        y = _product(flat, dequantise(weight, scale, x.dtype))
    else:
        band = max(BAND_ELEMENTS // columns // ROW_BLOCK, 1) * ROW_BLOCK
        scale_band = band // ROW_BLOCK if weight.dtype == torch.float8_e4m3fn else band
        weights = weight.split(band)
        parts = zip(weights, [None] * len(weights) if scale is None else scale.split(scale_band), strict=True)
        y = torch.cat([_product(flat, dequantise(w, s, x.dtype)) for w, s in parts], dim=-1)
    if spare:
        y = y[:rows]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _native_for(x: Tensor, weight: Tensor | Packed, scale: Tensor | None) -> ModuleType | None:
    """The extension module, if it is to compute this product."""
    fast = native()
    if fast is None or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        return None
    if isinstance(weight, Packed):
        return fast
    return fast if format_of(weight, scale) is not None else None


class _Native(torch.autograd.Function):
    """The native product where a gradient is needed; x is [..., I], or [..., G, I] for G matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Packed, scale: Tensor | None, fast: ModuleType) -> Tensor:
        ctx.save_for_backward(x, *(() if isinstance(weight, Packed) else (weight,)))
        ctx.packed, ctx.scale = weight if isinstance(weight, Packed) else None, scale
        return _run(fast, x, weight, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, *rest = ctx.saved_tensors
        weight, scale = ctx.packed.stored() if ctx.packed is not None else (rest[0], ctx.scale)
        x_TGI = x.reshape(-1, *(weight.shape[:-2] or (1,)), x.shape[-1])
        grad_TGO = grad.reshape(*x_TGI.shape[:2], -1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            values = dequantise(weight, scale, grad.dtype).view(x_TGI.shape[1], -1, x_TGI.shape[2])
            grad_x = torch.matmul(grad_TGO.transpose(0, 1), values).transpose(0, 1).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.matmul(grad_TGO.permute(1, 2, 0), x_TGI.transpose(0, 1))
            grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _run(fast: ModuleType, x: Tensor, weight: Tensor | Packed, scale: Tensor | None) -> Tensor:
    handle = weight.handle if isinstance(weight, Packed) else stored_weight(fast, weight, scale)
    groups = weight.shape[:-2]  # none, or G matrices side by side
    rows = x if x.dim() == 2 and not groups else x.reshape(-1, groups.numel() * x.shape[-1])
    y = x.new_empty(len(rows), groups.numel() * weight.shape[-2])
    (fast.linear_by_columns if groups else fast.linear)(handle, rows.contiguous(), y)
    return y if rows is x else y.view(*x.shape[:-1], weight.shape[-2])


def _compute(fast: ModuleType, x: Tensor, weight: Tensor | Packed, scale: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (isinstance(weight, Tensor) and weight.requires_grad)):
        return _Native.apply(x, weight, scale, fast)  # type: ignore[no-untyped-call]
    return _run(fast, x, weight, scale)


def linear(x: Tensor, weight: Tensor | Packed, scale: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of a weight [O, I], in the dtype of `x`.

    Args:
        weight: stored as in a release, or packed.
        scale: block scales of a stored FP8 or FP4 weight.
    """
    fast = _native_for(x, weight, scale)
    if fast is not None:
        return _compute(fast, x, weight, scale)
    return linear_reference(x, *(weight.stored() if isinstance(weight, Packed) else (weight, scale)))


def linear_by_columns(x_TGI: Tensor, weight_GOI: Tensor | Packed, scale: Tensor | None = None) -> Tensor:
    """Products of groups of columns with a matrix each: y[t, g] = W[g] x[t, g], [T, G, O] in the dtype of `x`.

    Args:
        weight_GOI: stored as in a release, or packed.
        scale: block scales, [G, O/128, I/128].
    """
    fast = _native_for(x_TGI, weight_GOI, scale)
    if fast is not None:
        return _compute(fast, x_TGI, weight_GOI, scale)
    stored = weight_GOI.stored() if isinstance(weight_GOI, Packed) else (weight_GOI, scale)
    return torch.einsum("tgi,goi->tgo", x_TGI, dequantise(*stored, x_TGI.dtype))


def linear_by_rows(x_RI: Tensor, weight_EOI: Packed, counts_E: Tensor) -> Tensor:
    """Products of neighbouring rows with a matrix each: the first counts[0] rows with the first matrix, and so on.

    Args:
        x_RI: rows, sorted by matrix; no gradient.
        counts_E: rows of each matrix.
    Returns:
        y_RO in the dtype of x.
    """
    fast = _native_for(x_RI, weight_EOI, None)
    if fast is None:
        weight, scale = weight_EOI.stored()
        parts = enumerate(x_RI.split(counts_E.tolist()))
        return torch.cat([linear_reference(x, weight[e], None if scale is None else scale[e]) for e, x in parts])
    y_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[-2])
    fast.linear_by_rows(weight_EOI.handle, x_RI.contiguous(), F.pad(counts_E.cumsum(0), (1, 0)), y_RO)
    return y_RO
