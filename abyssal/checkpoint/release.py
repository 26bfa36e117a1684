"""A release: config.json, shards, and the check that they hold what they should (architecture.md 3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from abyssal.arch.config import ModelConfig
from abyssal.arch.tensors import GROUP, Layout, TensorSpec, default_layout, inventory, is_draft_copy
from abyssal.base.errors import CheckpointError, ConfigError
from abyssal.checkpoint.shards import Shards

# a header decides over the config (trap 33): Base releases hold F32 scales although their config says ue8m0
SCALE_DTYPES = ("F8_E8M0", "F32")
PLAIN_DTYPES = ("BF16", "F32")
FP4_LAYOUTS = ("flash", "0731")
FOREIGN_SCALES = (".weight_scale_inv", ".weight_scale", ".scales", ".qscale")


class Release:
    """An opened release folder, every tensor of which has been checked against its inventory.

    Attributes:
        folder: where it lies.
        config: its config.json, with the expert format that the headers show.
        layout: flash, base, 0731, bf16 or fp32, as the headers show.
        shards: its tensors.

    Raises:
        ConfigError: config.json is missing, or describes something else.
        CheckpointError: a tensor is missing, unknown, or has another dtype or shape; the text names it.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        config = ModelConfig.from_file(self.folder / "config.json")
        self.shards = Shards(self.folder)
        self.config, self.layout = _recognise(config, self.shards)
        check_groups(self.config, self.layout)
        self.specs = {spec.name: spec for spec in inventory(self.config, self.layout)}
        self._check()

    def _check(self) -> None:
        for spec in self.specs.values():
            name = spec.name
            if is_draft_copy(name):
                copied = self.draft_copy(spec)
                if copied is None:  # the model's own tensors serve as well
                    continue
                name = copied
            if name not in self.shards:
                raise CheckpointError(self._missing(spec))
            found = self.shards.info(name)
            if found.dtype not in _accepted(spec):
                raise CheckpointError(
                    f"{name} has dtype {found.dtype}, expected {' or '.join(_accepted(spec))} in layout"
                    f" {self.layout}: this is another release than config.json describes"
                )
            if found.shape != spec.shape:
                raise CheckpointError(
                    f"{name} has shape {list(found.shape)}, expected {list(spec.shape)}:"
                    " this is another release than config.json describes"
                )
        for name in self.shards.tensors:
            if name not in self.specs and not is_draft_copy(name):
                raise CheckpointError(
                    f"tensor {name} is not part of a V4 release: is this folder V4.1 or a vision model?"
                )

    def _missing(self, spec: TensorSpec) -> str:
        if spec.name.endswith(".scale"):
            stem = spec.name.removesuffix(".scale")
            for suffix in FOREIGN_SCALES:
                if stem + suffix in self.shards:
                    return (
                        f"the scale of {stem}.weight is called {stem}{suffix}: releases call it {spec.name},"
                        " convert the folder back to the official names"
                    )
            return f"{stem}.weight lacks its scale {spec.name}: fetch the release again"
        return f"tensor {spec.name} is missing: fetch the release again"

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A weight as stored and its scale, or a plain tensor and None."""
        spec = self.specs[name]
        return self.shards.read(name), self.shards.read(spec.scale) if spec.scale else None

    def draft_copy(self, spec: TensorSpec) -> str | None:
        """The name under which this Base release keeps its private copy of embedding or head."""
        head = spec.name.endswith("head.weight")
        for name in self.shards.tensors:
            if is_draft_copy(name) and name.endswith("head.weight") == head:
                return name
        return None


def check_groups(config: ModelConfig, layout: Layout) -> None:
    """Packed FP4 has a scale for each 32 inputs.

    Raises:
        ConfigError: the inputs of the routed experts do not come in groups of 32.
    """
    for name in ("hidden_size", "moe_intermediate_size"):
        if layout in FP4_LAYOUTS and getattr(config, name) % GROUP:
            raise ConfigError(
                f"{name} is {getattr(config, name)}: FP4 experts need a multiple of {GROUP}, choose layout base or bf16"
            )


def _accepted(spec: TensorSpec) -> tuple[str, ...]:
    if spec.name.endswith(".scale"):
        return SCALE_DTYPES
    if spec.name.endswith(".tid2eid"):
        return ("I64", "I32")  # headers say I64, the reference's parameter is int32
    if spec.dtype == "I8":
        return ("I8", "U8")
    return PLAIN_DTYPES if spec.dtype == "BF16" else (spec.dtype,)


def _recognise(config: ModelConfig, shards: Shards) -> tuple[ModelConfig, Layout]:
    """The layout by what the first routed expert and a dense weight hold."""
    expert = shards.info("layers.0.ffn.experts.0.w1.weight")
    if expert.dtype in ("I8", "U8"):
        config = replace(config, expert_dtype="fp4")
    elif expert.dtype == "F8_E4M3":
        config = replace(config, expert_dtype="fp8")
    elif expert.dtype in PLAIN_DTYPES:
        torch_dtype = "float32" if expert.dtype == "F32" else "bfloat16"
        config = replace(config, expert_dtype=None, torch_dtype=torch_dtype)
    else:
        raise CheckpointError(f"{expert.name} has dtype {expert.dtype}: V4 releases hold I8 (FP4), F8_E4M3 or BF16")
    return config, default_layout(config)
