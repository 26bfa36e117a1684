"""E8M0: a scale that is a power of two, one byte, 2 ** (byte - 127); 255 is NaN (architecture.md 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.quant.precision import wide_dtype

BIAS = 127
NAN_BYTE = 255


def decode_e8m0(scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale bytes (uint8, int8 or float8_e8m0fnu) as numbers; a float scale is only cast."""
    if scale.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return scale.to(dtype)
    raw = scale if scale.dtype == torch.uint8 else scale.view(torch.uint8)
    precise = wide_dtype(dtype)
    exponent = raw.to(torch.int32) - BIAS
    value = torch.ldexp(torch.ones_like(exponent, dtype=precise), exponent)
    return value.masked_fill(raw == NAN_BYTE, float("nan")).to(dtype)


def encode_e8m0(scale: Tensor) -> Tensor:
    """Powers of two as bytes, uint8; NaN becomes 255.

    Raises:
        ValueError: a scale is not a power of two within 2**-127 .. 2**127.
    """
    mantissa, exponent = torch.frexp(scale)
    nan = scale.isnan()
    raw = exponent.to(torch.int32) - 1 + BIAS
    bad = ~nan & ((mantissa != 0.5) | (raw < 0) | (raw >= NAN_BYTE))
    if bool(bad.any()):
        value = float(scale[bad].flatten()[0])
        raise ValueError(f"scale {value} is not a power of two from 2**-127 to 2**127: round it up first")
    return raw.masked_fill(nan, NAN_BYTE).to(torch.uint8)


def power_of_two_above(x: Tensor) -> Tensor:
    """2 ** ceil(log2(x)) without a logarithm, so that exact powers stay themselves; x > 0.

    Infinity and NaN give NaN: a broken block shows itself instead of being clamped to a plausible number.
    """
    mantissa, exponent = torch.frexp(x)
    power = torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))
    return power + (x - x)  # + 0, or NaN
