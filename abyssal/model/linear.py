"""Linear layers whose weight may stay in FP8, and the grouped one of the output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from abyssal.kernels.linear import dequantise, linear, linear_by_columns
from abyssal.kernels.packed import Packed, packable
from abyssal.kernels.rounding import fake_fp8
from abyssal.quant.fp8 import TILE
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide

ACTIVATION_BLOCK = 128


class PackedModule(nn.Module):
    """A module that can keep weights in the order of the native kernels, in place of its parameters.

    A packed weight is no parameter: it takes no gradient, and moving or casting the module unpacks it first.
    `state_dict` and `load_state_dict` do not show the difference.

    Attributes:
        packed: what is packed, by name of the parameter.
        changes: how often any module was packed or unpacked.
        pairs: names of the parameters that may be packed, and of the buffers with their scales.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    changes = 0

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[str, Packed] = {}

    def _shaped(self, tensor: Tensor) -> Tensor:
        """A weight or scale as it is packed."""
        return tensor

    def _flat(self, tensor: Tensor) -> Tensor:
        """The way back."""
        return tensor

    def pack(self, in_place: bool = False) -> None:
        """Pack the weights that native kernels can read; those that record gradients stay.

        Args:
            in_place: reorder the memory of the parameters, which nobody else may use then.
        """
        for name, scale_name in self.pairs:
            weight, scale = getattr(self, name), getattr(self, scale_name)
            if weight is None:
                continue
            shaped = self._shaped(weight), None if scale is None else self._shaped(scale)
            if packable(*shaped):
                self._keep({name: Packed(*shaped, in_place=in_place)})

    def _keep(self, packed: dict[str, Packed]) -> None:
        self.packed.update(packed)
        PackedModule.changes += 1
        for name, scale_name in self.pairs:
            if name in packed:
                setattr(self, name, None)
                setattr(self, scale_name, None)

    def unpack(self) -> None:
        """Turn packed weights into parameters again."""
        for name, scale_name in self.pairs:
            if name in self.packed:
                weight, scale = (t if t is None else self._flat(t) for t in self.packed[name].stored())
                assert weight is not None
                setattr(self, name, nn.Parameter(weight, requires_grad=False))
                setattr(self, scale_name, scale)
        self.packed.clear()
        PackedModule.changes += 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        packed = dict(self.packed)
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._keep(packed)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class Linear(PackedModule):
    """y = x W^T without a bias.

    Attributes:
        weight: [O, I], float, or FP8 with `scale`; None while it is packed.
        scale: block scales of a quantised weight, else None.
    """

    scale: Tensor | None
    pairs = (("weight", "scale"),)

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", None)

    @property
    def matrix(self) -> Tensor | Packed:
        """The weight, packed or not."""
        return self.packed.get("weight", self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the dtype of x."""
        return linear(x, self.matrix, self.scale)


class WideLinear(Linear):
    """A product in float32: the compressor's projections and the router (architecture.md 2.6, 2.10)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in float32 (float64 for float64)."""
        return super().forward(wide(x))


class QuantLinear(Linear):
    """A linear that the checkpoint stores in FP8: its input is rounded to FP8 when the numerics ask."""

    def __init__(self, in_features: int, out_features: int, numerics: Numerics):
        super().__init__(in_features, out_features)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O], in the dtype of x."""
        if self.numerics.activations:
            x = fake_fp8(x, ACTIVATION_BLOCK)
        return super().forward(x)


class GroupedLinear(Linear):
    """G independent products, one for each group of inputs (wo_a; its input is never rounded)."""

    def __init__(self, in_features: int, out_features: int, groups: int):
        super().__init__(in_features, out_features)
        self.groups = groups

    def _shaped(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.groups, -1)) if tensor.shape[0] % self.groups == 0 else tensor

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)

    def pack(self, in_place: bool = False) -> None:
        """As for every module, but for tiles that reach across groups."""
        if self.packed or self._whole_tiles():
            super().pack(in_place)

    def _whole_tiles(self) -> bool:
        """Whether no tile of FP8 reaches across groups."""
        return self.scale is None or self.weight.shape[0] % (self.groups * TILE) == 0

    def by_group(self) -> tuple[Tensor, Tensor | None]:
        """The weight that is not packed, [G, O/G, I], and its scale."""
        if not self._whole_tiles():
            return self._shaped(dequantise(self.weight, self.scale, torch.float32)), None
        return self._shaped(self.weight), None if self.scale is None else self._shaped(self.scale)

    def forward(self, x_TGI: Tensor) -> Tensor:
        """x [T, G, I] -> [T, G * O/G]."""
        packed = self.packed.get("weight")
        return linear_by_columns(x_TGI, *((packed, None) if packed is not None else self.by_group())).flatten(1)
