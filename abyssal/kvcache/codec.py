"""How a vector is stored: as computed, rounded to the packed precision, or packed (architecture.md 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abyssal.kernels.entry import fake_entry, pack_entry, pack_index_key
from abyssal.kernels.rounding import fake_fp4
from abyssal.quant.entry import entry_bytes, index_key_bytes, unpack_entry, unpack_index_key
from abyssal.quant.numerics import Mode


@dataclass(frozen=True)
class Codec:
    """Storage of one kind of vector.

    Attributes:
        kind: "entry" for window and compressed entries, "key" for index keys.
        mode: exact, fake or packed; packed gives back the bits that fake keeps.
        dim: values of a vector.
        rope_dim: rotated values at its end; they stay bfloat16 in an entry.
        dtype: what `decode` returns, the activation dtype.
    """

    kind: Literal["entry", "key"]
    mode: Mode
    dim: int
    rope_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Elements of a stored vector: bytes if packed, values otherwise."""
        if self.mode != "packed":
            return self.dim
        return entry_bytes(self.dim, self.rope_dim) if self.kind == "entry" else index_key_bytes(self.dim)

    @property
    def stored_dtype(self) -> torch.dtype:
        """uint8 if packed, else the activation dtype."""
        return torch.uint8 if self.mode == "packed" else self.dtype

    def encode(self, x: Tensor) -> Tensor:
        """x [..., dim] as it is stored, [..., width]."""
        if self.mode == "exact":
            return x
        if self.kind == "entry":
            return pack_entry(x, self.rope_dim) if self.mode == "packed" else fake_entry(x, self.rope_dim)
        return pack_index_key(x) if self.mode == "packed" else fake_fp4(x)

    def decode(self, stored: Tensor) -> Tensor:
        """Stored vectors [..., width] as values [..., dim]."""
        if self.mode != "packed":
            return stored
        if self.kind == "entry":
            return unpack_entry(stored, self.dim, self.rope_dim, self.dtype)
        return unpack_index_key(stored, self.dtype)
