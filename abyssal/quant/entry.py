"""Packed cache entries and index keys (architecture.md 4.1).

An entry is its unrotated values as E4M3 in blocks of 64, its rotated values as bfloat16, one scale byte for
each block, and zeros up to a multiple of 8 bytes: 448 + 128 + 7 + 1 = 584 bytes at V4's sizes. An index key
is packed FP4 with one scale byte for 32 values: 64 + 4 = 68 bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.quant.e8m0 import decode_e8m0, encode_e8m0
from abyssal.quant.fp4 import GROUP, dequantise_fp4, quantise_fp4
from abyssal.quant.fp8 import block_scale, blocks_of, fake_fp8, round_once, to_e4m3
from abyssal.quant.precision import wide, wide_dtype

BLOCK = 64
ALIGN = 8


def entry_bytes(dim: int, rope_dim: int) -> int:
    """Bytes of a packed entry of `dim` values, the last `rope_dim` of them rotated."""
    plain = dim - rope_dim
    return -(-(plain + 2 * rope_dim + -(-plain // BLOCK)) // ALIGN) * ALIGN


def index_key_bytes(dim: int) -> int:
    """Bytes of a packed index key of `dim` values."""
    return dim // 2 + -(-dim // GROUP)


def _to_bfloat16(x: Tensor) -> Tensor:
    return round_once(x, 8, -126).to(torch.bfloat16)


def pack_entry(x: Tensor, rope_dim: int) -> Tensor:
    """Entries [..., dim] as bytes [..., entry_bytes]."""
    dim = x.shape[-1]
    plain = dim - rope_dim
    cut = blocks_of(wide(x)[..., :plain], BLOCK)
    scale = block_scale(cut)
    codes = to_e4m3(cut / scale).flatten(-2)[..., :plain].contiguous().view(torch.uint8)
    tail = _to_bfloat16(x[..., plain:]).contiguous().view(torch.uint8)
    parts = [codes, tail, encode_e8m0(scale.squeeze(-1))]
    spare = entry_bytes(dim, rope_dim) - sum(p.shape[-1] for p in parts)
    return torch.cat([*parts, codes.new_zeros(*x.shape[:-1], spare)], dim=-1)


def unpack_entry(packed: Tensor, dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """Bytes [..., entry_bytes] as entries [..., dim]."""
    plain = dim - rope_dim
    precise = wide_dtype(dtype)
    scales = packed[..., plain + 2 * rope_dim : plain + 2 * rope_dim + -(-plain // BLOCK)]
    codes = packed[..., :plain].contiguous().view(torch.float8_e4m3fn).to(precise)
    values = (blocks_of(codes, BLOCK) * decode_e8m0(scales, precise).unsqueeze(-1)).flatten(-2)[..., :plain]
    # a copy, because a lone entry's slice may start at an odd byte
    tail = packed[..., plain : plain + 2 * rope_dim].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    return torch.cat([values.to(dtype), tail.to(dtype)], dim=-1)


def fake_entry(x: Tensor, rope_dim: int) -> Tensor:
    """What packing and unpacking make of entries [..., dim]; the gradient passes straight through."""
    plain = x.shape[-1] - rope_dim
    tail = x[..., plain:]
    rounded = _to_bfloat16(tail.detach()).to(x.dtype)
    if x.requires_grad:
        rounded = tail + (rounded - tail).detach()
    return torch.cat([fake_fp8(x[..., :plain], BLOCK), rounded], dim=-1)


def pack_index_key(x: Tensor) -> Tensor:
    """Index keys [..., dim] as bytes [..., index_key_bytes]."""
    dim = x.shape[-1]
    codes, scales = quantise_fp4(F.pad(x, (0, -dim % GROUP)))
    return torch.cat([codes[..., : dim // 2], scales], dim=-1)


def unpack_index_key(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., index_key_bytes] as index keys [..., dim]."""
    groups, rest = divmod(packed.shape[-1], GROUP // 2 + 1)
    dim = groups * GROUP + (2 * (rest - 1) if rest else 0)
    codes, scales = packed[..., : dim // 2], packed[..., dim // 2 :]
    codes = F.pad(codes, (0, -dim % GROUP // 2))
    return dequantise_fp4(codes.contiguous(), scales.contiguous(), dtype)[..., :dim]
