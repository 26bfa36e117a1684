"""packed weights: a matrix, or a stack of them, in the order in which the native kernels read it.

A packed weight has the bytes of the stored one in another order, so a model that keeps it in place of the stored
tensor needs no more memory. `stored` gives back the very tensors that were packed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abyssal.kernels.choice import extension, native
from abyssal.quant.e8m0 import decode_e8m0

STRIP = 16  # outputs that are computed side by side
GROUP = 32  # inputs that are summed before their scale is applied
FORMATS = ("float32", "bfloat16", "float8", "float4")
_PIECE = 1 << 22  # bytes that are looked at together
_BITS = {"float32": 32, "bfloat16": 16, "float8": 8, "float4": 4}
_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8",
    torch.int8: "float4",
    torch.uint8: "float4",
}


def format_of(weight: Tensor, scale: Tensor | None) -> str | None:
    """The format in which native kernels read a stored weight; None if they cannot."""
    found = _DTYPES.get(weight.dtype)
    if weight.device.type != "cpu" or weight.dim() < 2 or (scale is None) != (found in ("float32", "bfloat16")):
        return None
    if scale is not None and (scale.shape[:-2] != weight.shape[:-2] or scale.dim() < 2):
        return None  # tiles of FP8 that reach across matrices
    return None if found == "float4" and scale is not None and scale.element_size() > 1 else found


def packable(weight: Tensor, scale: Tensor | None = None) -> bool:
    """Whether native kernels run here and read this weight; one with NaN codes is left to the reference."""
    if native() is None or weight.requires_grad:
        return False
    found = format_of(weight, scale)
    if found != "float8":
        return found is not None
    pieces = weight.view(torch.uint8).flatten().split(_PIECE)
    return not any(bool(((piece & 0x7F) == 0x7F).any()) for piece in pieces)


def stored_weight(fast: ModuleType, weight: Tensor, scale: Tensor | None) -> Any:
    """A weight that stays as it is, as the native kernels take it; they pack its strips anew in every call."""
    found = format_of(weight, scale)
    assert found is not None
    outputs, inputs = weight.shape[-2], weight.shape[-1] * (2 if found == "float4" else 1)
    matrices = weight.shape[:-2].numel()
    return fast.Weight(
        FORMATS.index(found), matrices, outputs, inputs, True, _bytes(weight), _kernel_scales(found, scale)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).view(-1)


def _kernel_scales(found: str, scale: Tensor | None) -> Tensor | None:
    if scale is None:
        return None
    return _bytes(scale) if found == "float4" else decode_e8m0(scale.detach(), torch.float32).contiguous().view(-1)


class Packed:
    """A packed weight.

    Args:
        weight: [..., O, I] float32, bfloat16 or float8_e4m3fn, or packed FP4 (int8/uint8) [..., O, I/2].
        scale: its block scales, or None for a float weight.

    Attributes:
        shape: [..., O, I] in numbers, not bytes.
        format: one of `FORMATS`.
        handle: what the native kernels take.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        found, fast = format_of(weight, scale), extension()
        if found is None or fast is None:
            raise ValueError(f"a weight of {weight.dtype} on {weight.device} cannot be packed here: see `packable`")
        self.format = found
        self.shape = torch.Size([*weight.shape[:-1], weight.shape[-1] * (2 if found == "float4" else 1)])
        self._fast = fast
        self._like = (weight.dtype, weight.shape)
        self._data = torch.empty(self._blocks * STRIP * GROUP * _BITS[found] // 8, dtype=torch.uint8)
        fast.pack(*self._sizes, _bytes(weight), self._data, False)
        # FP4's scales are packed too; those of FP8 are few, and kept as they were beside
        self._scales = _kernel_scales(found, scale)
        self._scale = None if scale is None else scale.detach()
        if found == "float4" and self._scales is not None and self._scale is not None:
            E, O, groups = self.matrices, self.shape[-2], self._groups
            rows = F.pad(self._scales.view(E, O, groups), (0, 0, 0, -O % STRIP))
            self._scales = rows.view(E, -(-O // STRIP), STRIP, groups).transpose(2, 3).contiguous().view(-1)
            self._scale = self._scale.new_empty(0)  # its type alone
        self.handle = fast.Weight(*self._sizes, False, self._data, self._scales)

    @property
    def matrices(self) -> int:
        """How many matrices lie one after another."""
        return self.shape[:-2].numel()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    @property
    def _groups(self) -> int:
        return -(-self.shape[-1] // GROUP)

    @property
    def _blocks(self) -> int:
        return self.matrices * -(-self.shape[-2] // STRIP) * self._groups

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return FORMATS.index(self.format), self.matrices, self.shape[-2], self.shape[-1]

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """The weight and its scale as they were before packing, in memory of their own."""
        dtype, shape = self._like
        weight = torch.empty(shape, dtype=dtype)
        self._fast.pack(*self._sizes, weight.view(torch.uint8).view(-1), self._data, True)
        if self._scales is None or self._scale is None or self.format == "float8":
            return weight, self._scale
        strips = -(-shape[-2] // STRIP)
        rows = self._scales.view(self.matrices, strips, self._groups, STRIP).transpose(2, 3).flatten(1, 2)
        scale = rows[:, : shape[-2]].contiguous().view(*shape[:-1], self._groups)
        return weight, scale.view(self._scale.dtype)

    def __reduce__(self) -> Any:
        return Packed, self.stored()
