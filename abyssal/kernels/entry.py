"""entry: vectors as the cache stores them (architecture.md 4.1); what that means stands in `abyssal.quant.entry`.

Native kernels give the same bytes in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kernels.choice import native_for
from abyssal.quant import entry


def _encode(x: Tensor, key: bool, rope_dim: int, width: int | None) -> Tensor | None:
    fast = native_for(x)
    if fast is None or (key and x.shape[-1] % 2):
        return None
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    out = x.new_empty(shape, dtype=torch.float32 if width is None else torch.uint8)
    fast.encode(x.reshape(-1, x.shape[-1]).contiguous(), key, rope_dim, out.view(-1, shape[-1]))
    return out


def pack_entry(x: Tensor, rope_dim: int) -> Tensor:
    """Entries [..., dim] as bytes [..., entry_bytes]; the last `rope_dim` values stay bfloat16."""
    found = _encode(x, False, rope_dim, entry.entry_bytes(x.shape[-1], rope_dim))
    return entry.pack_entry(x, rope_dim) if found is None else found


def fake_entry(x: Tensor, rope_dim: int) -> Tensor:
    """What packing and unpacking make of entries [..., dim]; the gradient passes straight through."""
    found = _encode(x, False, rope_dim, None)
    return entry.fake_entry(x, rope_dim) if found is None else found


def pack_index_key(x: Tensor) -> Tensor:
    """Index keys [..., dim] as bytes [..., index_key_bytes]."""
    found = _encode(x, True, 0, entry.index_key_bytes(x.shape[-1]))
    return entry.pack_index_key(x) if found is None else found
