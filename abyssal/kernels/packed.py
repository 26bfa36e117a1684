"""packed weights: a matrix, or a stack of them, in the order in which the native kernels read it.

A packed weight has the bytes of the stored one in another order, so a model that keeps it in place of the stored
tensor needs no more memory. `stored` gives back the very tensors that were packed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
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
        in_place: reorder the weight's own memory where sizes allow; the caller gives the weight up.

    Attributes:
        shape: [..., O, I] in numbers, not bytes.
        format: one of `FORMATS`.
        handle: what the native kernels take.
    """

    _scales: Tensor | None
    _scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None, *, in_place: bool = False):
        self._describe(weight, scale, weight.shape)
        data = _bytes(weight)
        whole = self.shape[-2] % STRIP == 0 and self.shape[-1] % GROUP == 0
        self._data = data if in_place and whole else self._room()
        scales = _kernel_scales(self.format, scale)
        self._scales = self._scales_room() if self.format == "float4" else scales  # FP8's are few, and stay as they are
        if scale is not None:
            self._scale = scale.detach() if self.format == "float8" else scale.new_empty(0)  # FP4: its type alone
        self._fast.pack(*self._sizes, data, self._data, False, *self._packed_scales(scales))
        self.handle = self._fast.Weight(*self._sizes, False, self._data, self._scales)

    @classmethod
    def empty(cls, count: int, weight: Tensor, scale: Tensor | None = None) -> Packed:
        """Room for `count` matrices like this one, [O, I] with its scale; `put` fills it."""
        self = cls.__new__(cls)
        self._describe(weight, scale, torch.Size([count, *weight.shape]))
        self._data = self._room()
        if scale is not None:
            size = 0 if self.format == "float4" else count
            self._scale = scale.new_empty(size, *scale.shape)
            self._scales = self._scales_room() if size == 0 else torch.empty(self._scale.numel())
        self.handle = self._fast.Weight(*self._sizes, False, self._data, self._scales)
        return self

    def put(self, place: int, weight: Tensor, scale: Tensor | None = None) -> None:
        """Pack one matrix over what is at `place`; other places may be used meanwhile.

        Args:
            weight: as stored, or its bytes. scale: as stored; of FP4 also its bytes.
        """
        count = self.matrices
        scales = _kernel_scales(self.format, scale)
        packed = None if self._scales is None else self._scales.view(count, -1)[place]
        if scale is not None and scales is not None and packed is not None and self.format == "float8":
            assert self._scale is not None
            self._scale[place] = scale
            packed.copy_(scales)
        fp4 = (scales, packed) if self.format == "float4" else (None, None)
        sizes = self._sizes[0], 1, *self._sizes[2:]
        self._fast.pack(*sizes, _bytes(weight), self._data.view(count, -1)[place], False, *fp4)

    def _describe(self, weight: Tensor, scale: Tensor | None, shape: torch.Size) -> None:
        found, fast = format_of(weight, scale), extension()
        if found is None or fast is None:
            raise ValueError(f"a weight of {weight.dtype} on {weight.device} cannot be packed here: see `packable`")
        self.format = found
        self.shape = torch.Size([*shape[:-1], shape[-1] * (2 if found == "float4" else 1)])
        self._fast = fast
        self._like = (weight.dtype, shape)
        self._scales = None
        self._scale = None

    def _room(self) -> Tensor:
        return torch.empty(self._blocks * STRIP * GROUP * _BITS[self.format] // 8, dtype=torch.uint8)

    def _scales_room(self) -> Tensor:
        return torch.empty(self._blocks * STRIP, dtype=torch.uint8)

    def _packed_scales(self, stored: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What `pack` takes beside the weight: FP4's scales, stored and packed."""
        return (stored, self._scales) if self.format == "float4" else (None, None)

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
        fp4 = self.format == "float4"
        scales = torch.empty(*shape[:-1], self._groups, dtype=torch.uint8) if fp4 else None
        pair = self._packed_scales(None if scales is None else scales.view(-1))
        self._fast.pack(*self._sizes, weight.view(torch.uint8).view(-1), self._data, True, *pair)
        if scales is not None and self._scale is not None:
            return weight, scales.view(self._scale.dtype)
        return weight, None if self._scale is None else self._scale.clone()

    def __reduce__(self) -> Any:
        return Packed, self.stored()
