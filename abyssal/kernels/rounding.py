"""rounding: values as FP8 or FP4 would hold them, or as the cache stores them, and the indexer's Hadamard transform.

Architecture.md 2.7, 3.6 and 4.1.

What they mean stands in `abyssal.quant`; native kernels give the same bits in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.choice import native_for
from abyssal.quant import entry, fp4, fp8
from abyssal.quant import hadamard as plain

_FP8, _FP4, _HADAMARD = range(3)


def fake_fp8(x: Tensor, block: int) -> Tensor:
    """Round to FP8 and back, one scale for each `block` values of the last dimension."""
    if (fast := native_for(x)) is None:
        return fp8.fake_fp8(x, block)
    x = x.contiguous()
    y = torch.empty_like(x)
    fast.rounding(_FP8, block, x, y)
    return y


def fake_fp4(x: Tensor, group: int = fp4.GROUP) -> Tensor:
    """Round to FP4 and back, one scale for each `group` values of the last dimension."""
    if (fast := native_for(x)) is None:
        return fp4.fake_fp4(x, group)
    x = x.contiguous()
    y = torch.empty_like(x)
    fast.rounding(_FP4, group, x, y)
    return y


def hadamard(x: Tensor) -> Tensor:
    """Sylvester-ordered transform of the last dimension, times its length ** -0.5; its own inverse.

    Raises:
        ValueError: the last dimension is not a power of two.
    """
    size = x.shape[-1]
    if (fast := native_for(x)) is None or size & (size - 1) or not size:
        return plain.hadamard(x)
    x = x.contiguous()
    y = torch.empty_like(x)
    fast.rounding(_HADAMARD, 1, x, y)
    return y


def pack_entry(x: Tensor, rope_dim: int) -> Tensor:
    """Entries [..., dim], the last `rope_dim` values of them rotated, as bytes [..., entry_bytes]."""
    if (fast := native_for(x)) is None:
        return entry.pack_entry(x, rope_dim)
    packed = torch.empty(*x.shape[:-1], entry.entry_bytes(x.shape[-1], rope_dim), dtype=torch.uint8)
    fast.encode(False, rope_dim, x.contiguous(), packed)
    return packed


def pack_index_key(x: Tensor) -> Tensor:
    """Index keys [..., dim] as bytes [..., index_key_bytes]."""
    if (fast := native_for(x)) is None:
        return entry.pack_index_key(x)
    packed = torch.empty(*x.shape[:-1], entry.index_key_bytes(x.shape[-1]), dtype=torch.uint8)
    fast.encode(True, 0, x.contiguous(), packed)
    return packed
