"""Fill modules with a release's tensors (architecture.md 3)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from abyssal.base.errors import CheckpointError
from abyssal.checkpoint.release import Release
from abyssal.kernels.linear import dequantise
from abyssal.kernels.packed import packable
from abyssal.model.linear import Linear
from abyssal.model.moe import EXPERT_WEIGHTS, Experts
from abyssal.model.transformer import Transformer
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide_dtype


def load_model(
    folder: Path | str | Release,
    *,
    dtype: torch.dtype = torch.float32,
    numerics: Numerics | None = None,
    keep_quantised: bool = False,
) -> Transformer:
    """A whole model in memory.

    Args:
        folder: a release, or one that is open already.
        dtype: of activations and of every matrix that is not kept quantised.
        numerics: which roundings are simulated.
        keep_quantised: leave FP4 and FP8 weights as stored and expand them as they are used; where native kernels run,
            bfloat16 matrices too, which give the bits of their values in float32.
    Returns:
        The model in evaluation mode; parameters do not record gradients.
    Raises:
        ConfigError, CheckpointError: the release is wrong.
    """
    release = folder if isinstance(folder, Release) else Release(folder)
    with torch.device("meta"):
        model = Transformer(release.config, numerics=numerics, dtype=dtype)
    fill(model, "", release, dtype, keep_quantised)
    return model.eval()


def fill(module: nn.Module, prefix: str, release: Release, dtype: torch.dtype, keep_quantised: bool) -> None:
    """Replace every parameter and table of `module`, made on the meta device, by the release's.

    Matrices take `dtype`; norms, sinks, biases, ape and mHC, which are used in float32, keep at least that.

    Args:
        prefix: of the module's names in the release, such as "layers.3.".
    """
    for path, child in module.named_modules():
        name = f"{prefix}{path}." if path else prefix
        if isinstance(child, Experts):
            if child.w1.device.type == "meta":
                _fill_experts(child, name, release, dtype, keep_quantised)
            continue
        for leaf, parameter in list(child.named_parameters(recurse=False)):
            weight, scale = release.stored(name + leaf)
            if isinstance(child, Linear) and leaf == "weight":
                if scale is not None and keep_quantised:
                    child.scale = scale
                elif not (keep_quantised and dtype == torch.float32 and packable(weight)):
                    weight = dequantise(weight, scale, dtype)
            else:
                weight = weight.to(dtype if parameter.dim() == 2 and leaf == "weight" else wide_dtype(dtype))
            setattr(child, leaf, nn.Parameter(weight, requires_grad=False))
        for leaf, buffer in list(child.named_buffers(recurse=False)):
            if leaf == "tid2eid" and buffer is not None:
                table = release.shards.read(name + leaf).long()
                top = release.config.n_routed_experts - 1
                if table.numel() and not 0 <= int(table.min()) <= int(table.max()) <= top:
                    raise CheckpointError(f"{name}{leaf} has expert numbers outside 0..{top}: fetch the release again")
                child.register_buffer(leaf, table)


def _fill_experts(experts: Experts, prefix: str, release: Release, dtype: torch.dtype, keep: bool) -> None:
    for part in EXPERT_WEIGHTS:
        weights: list[Tensor] = []
        scales: list[Tensor] = []
        for number in range(experts.config.n_routed_experts):
            weight, scale = release.stored(f"{prefix}{number}.{part}.weight")
            if scale is not None and keep:
                scales.append(scale)
                weights.append(weight)
            else:
                weights.append(dequantise(weight, scale, dtype))
        setattr(experts, part, nn.Parameter(torch.stack(weights), requires_grad=False))
        if scales:
            experts.register_buffer(f"{part}_scale", torch.stack(scales))
