"""Quantisation-aware training: weights take a release's values, gradients pass straight through (training.md 4)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from abyssal.arch.tensors import TensorSpec, inventory
from abyssal.checkpoint.save import with_layout
from abyssal.checkpoint.shards import TORCH_DTYPES
from abyssal.kernels.linear import dequantise
from abyssal.model import Transformer
from abyssal.quant.fp4 import quantise_fp4
from abyssal.quant.fp8 import quantise_fp8
from abyssal.train.world import is_spread, local

FORMATS = frozenset({"fp4", "fp8", "plain"})


def released_formats(model: Transformer) -> dict[str, TensorSpec]:
    """How a release with FP4 experts stores each parameter; stacked experts as one of them."""
    config, layout = with_layout(model.config, "flash")
    found = {}
    for spec in inventory(config, layout):
        head, routed, tail = spec.name.partition(".ffn.experts.")
        if not routed:
            found[spec.name] = spec
        elif tail.endswith(".weight"):
            found[f"{head}{routed}{tail.split('.')[1]}"] = spec
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def as_released(weight: Tensor, spec: TensorSpec) -> Tensor:
    """The values that a release would hold of a weight, in the weight's dtype."""
    if spec.format == "plain":
        return weight.to(TORCH_DTYPES[spec.dtype]).to(weight.dtype)
    return dequantise(*(quantise_fp4 if spec.format == "fp4" else quantise_fp8)(weight), weight.dtype)


@contextmanager
def quantised(model: Transformer, formats: Collection[str] = FORMATS) -> Iterator[None]:
    """Inside, weights of these formats hold what a release would; forward and backward pass belong inside.

    The gradient of a rounded weight becomes that of its master, which is back behind the block. Activations, entries
    and index keys are rounded by the model's own `Numerics`.

    Args:
        model: whose parameters are float.
        formats: some of fp4 (routed experts), fp8 (other matrices), plain (bfloat16); an empty one changes nothing.
    """
    masters: list[tuple[torch.nn.Parameter, Tensor]] = []
    specs = released_formats(model) if formats else {}
    try:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in specs and specs[name].format in formats:
                    masters.append((p, _replace(p, as_released_part(p.detach(), specs[name]))))
        yield
    finally:
        for p, master in masters:
            _replace(p, master)


def as_released_part(p: Tensor, spec: TensorSpec) -> Tensor:
    """This process's part of the released values of a parameter."""
    if is_spread(p) and spec.format == "fp8":  # tiles reach over the rows of several processes
        from abyssal.train.parallel.parts import part_of, whole

        return part_of(as_released(whole(p), spec), p)
    return as_released(local(p), spec)


def _replace(p: torch.nn.Parameter, values: Tensor) -> Tensor:
    """Put values in place of this process's part of a parameter; what was there."""
    if not is_spread(p):
        before, p.data = p.data, values
        return before
    held = local(p.detach())  # others know its memory, so it is written to
    before = held.clone()
    held.copy_(values)
    return before
