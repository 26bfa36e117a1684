"""Write releases: from a model, from another release, or random ones for tests (architecture.md 3)."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from abyssal.arch.config import ModelConfig
from abyssal.arch.tensors import LAYOUTS, Layout, TensorSpec, inventory, is_draft_copy, totals
from abyssal.base.errors import CheckpointError, ConfigError, SaveError
from abyssal.base.files import write_folder, write_json
from abyssal.base.progress import Progress
from abyssal.checkpoint.release import Release, check_groups
from abyssal.checkpoint.shards import TORCH_DTYPES
from abyssal.checkpoint.writer import SHARD_BYTES, ShardWriter
from abyssal.kernels.linear import dequantise
from abyssal.quant.e8m0 import decode_e8m0, encode_e8m0
from abyssal.quant.fp4 import fp4_to_fp8, fp8_to_fp4, quantise_fp4
from abyssal.quant.fp8 import quantise_fp8

Value = tuple[Tensor, Tensor | None]  # a stored weight and its scale
QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.uint8)


def with_layout(config: ModelConfig, layout: Layout) -> tuple[ModelConfig, Layout]:
    """The configuration that describes a model in this layout.

    Raises:
        ConfigError: the layout is unknown, or needs DSpark stages or groups of inputs that the model lacks.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    if layout == "flash" and config.dspark:
        layout = "0731"
    if layout == "0731" and not config.dspark:
        raise ConfigError("layout 0731 has DSpark stages, which this model lacks: choose flash")
    check_groups(config, layout)
    expert = {"flash": "fp4", "0731": "fp4", "base": "fp8"}.get(layout)
    torch_dtype = "float32" if layout == "fp32" else "bfloat16"
    return replace(config, expert_dtype=expert, torch_dtype=torch_dtype), layout


def _as_stored(spec: TensorSpec, value: Value, scale_dtype: str | None) -> Value:
    """A value in the format of `spec`: copied, converted without loss, or rounded."""
    weight, scale = value
    if spec.format == "plain":
        target = TORCH_DTYPES[spec.dtype]
        return (dequantise(weight, scale, target) if scale is not None else weight.to(target)), None
    packed = weight.dtype in (torch.int8, torch.uint8)
    if spec.format == "fp4" and not (packed and scale is not None):
        weight, scale = _to_fp4(weight, scale)
    elif spec.format == "fp8" and packed and scale is not None:
        weight, scale = fp4_to_fp8(weight, scale)
    elif spec.format == "fp8" and scale is None:
        weight, scale = quantise_fp8(weight)
    assert scale is not None
    stored = weight.view(torch.int8) if spec.format == "fp4" else weight
    if scale_dtype == "F32":
        return stored, decode_e8m0(scale, torch.float32)
    raw = scale if scale.dtype != torch.float32 else encode_e8m0(scale)
    return stored, raw.view(torch.float8_e8m0fnu)


def _to_fp4(weight: Tensor, scale: Tensor | None) -> Value:
    if scale is not None:
        try:
            return fp8_to_fp4(weight, scale)
        except ValueError:  # not FP4 numbers: round them
            weight = dequantise(weight, scale, torch.float32)
    return quantise_fp4(weight)


def _write(
    config: ModelConfig,
    layout: Layout,
    folder: Path,
    value_of: Callable[[TensorSpec], Value],
    beside: Callable[[Path], None],
    shard_bytes: int,
) -> None:
    """Write every tensor of the inventory, config.json and what `beside` adds; whole or not at all."""
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise SaveError(f"{folder} exists and is not a release: choose a new folder")
    specs = list(inventory(config, layout))
    scale_dtypes = {spec.name: spec.dtype for spec in specs}
    with write_folder(folder) as aside, Progress(totals(specs).nbytes, "B", f"writing {folder.name}") as progress:
        with ShardWriter(aside, specs, shard_bytes) as writer:
            scales: dict[str, Tensor] = {}
            for spec in specs:
                if spec.name in scales:
                    writer.add(spec.name, scales.pop(spec.name))
                else:
                    scale_dtype = scale_dtypes[spec.scale] if spec.scale else None
                    try:
                        weight, scale = _as_stored(spec, value_of(spec), scale_dtype)
                    except ValueError as error:  # of the number formats, which know no names
                        raise CheckpointError(f"{spec.name}: {error}; nothing was written") from None
                    writer.add(spec.name, weight)
                    if spec.scale and scale is not None:
                        scales[spec.scale] = scale
                progress.advance(spec.nbytes)
        write_json(aside / "config.json", config.to_dict())
        beside(aside)


def _new_small_files(config: ModelConfig, files_from: Path | None = None) -> Callable[[Path], None]:
    """Writes the generation_config.json of a release that has no source, and copies what is given."""

    def beside(aside: Path) -> None:
        settings = {
            "_from_model_config": True,
            "bos_token_id": config.bos_token_id,
            "do_sample": True,
            "eos_token_id": config.eos_token_id,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        write_json(aside / "generation_config.json", settings)
        if files_from is not None:
            copy_small_files(files_from)(aside)

    return beside


def _shared_name(copy: str) -> str:
    """Whose copy a Base release's private MTP tensor is."""
    return "head.weight" if copy.endswith("head.weight") else "embed.weight"


def _keep_apart(source: Path, folder: Path) -> None:
    """Refuse to replace a folder that holds the source, or to write into what is being copied."""
    inner, outer = folder.resolve(), source.resolve()
    if outer in inner.parents or inner in outer.parents:
        raise CheckpointError(f"{folder} and {source} lie inside each other: choose a folder outside")


def copy_small_files(source: Path) -> Callable[[Path], None]:
    """Copies tokenizer, notes and other files of a release that are neither weights nor config.json."""

    def copy(target: Path) -> None:
        for item in source.iterdir():
            if item.name == "config.json" or ".safetensors" in item.name or item.name.startswith("."):
                continue
            if item.is_dir():
                shutil.copytree(item, target / item.name)
            else:
                shutil.copyfile(item, target / item.name)

    return copy


def save_model(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    layout: Layout,
    folder: Path | str,
    *,
    files_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's state as a release that `transformers` loads unchanged.

    Args:
        state: `Transformer.state_dict()`; routed experts stacked, weights float or still quantised.
        config: the model's numbers.
        layout: flash, base, bf16 or fp32.
        folder: where to; replaced as a whole, or left as it is on any failure.
        files_from: a folder whose tokenizer and other small files are copied.
    Raises:
        SaveError: the file system refused, or the state lacks a tensor.
        CheckpointError: a weight cannot be stored in this layout, or the folders lie inside each other.
        ConfigError: the layout does not fit the model.
    """
    config, layout = with_layout(config, layout)
    if files_from is not None:
        _keep_apart(files_from, Path(folder))

    def value_of(spec: TensorSpec) -> Value:
        return _from_state(state, spec.name)

    _write(config, layout, Path(folder), value_of, _new_small_files(config, files_from), shard_bytes)


def _from_state(state: Mapping[str, Tensor], name: str) -> Value:
    head, routed, tail = name.partition(".ffn.experts.")
    number: int | None = None
    if routed:
        expert, part, _ = tail.split(".")
        number, name = int(expert), f"{head}{routed}{part}"
    elif is_draft_copy(name):
        name = _shared_name(name)
    if name not in state:
        raise SaveError(f"the model has no {name}, which the release needs; nothing was written")
    weight = state[name]
    scale = state.get(f"{name}_scale" if routed else f"{name.removesuffix('.weight')}.scale")
    if scale is None and weight.dtype in QUANTISED_DTYPES:
        raise SaveError(f"{name} is quantised ({weight.dtype}) and its scale is not in the state; nothing was written")
    if number is not None:
        return weight[number], None if scale is None else scale[number]
    return weight, scale


def convert(source: Path | str, folder: Path | str, layout: Layout, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a release in another layout, tensor by tensor.

    FP4 becomes FP8 without loss; FP8 that came from FP4 goes back without loss; anything else is rounded.

    Raises:
        CheckpointError: the source is wrong or cannot be stored in this layout, or both folders are the same or
            lie inside each other.
        ConfigError: the layout does not fit the model.
        SaveError: the file system refused; nothing was written.
    """
    release = Release(source)
    if Path(folder).resolve() == release.folder.resolve():
        raise CheckpointError(f"{folder} is the source itself: choose another folder")
    _keep_apart(release.folder, Path(folder))
    config, layout = with_layout(release.config, layout)

    def value_of(spec: TensorSpec) -> Value:
        if is_draft_copy(spec.name):
            return release.shards.read(release.draft_copy(spec) or _shared_name(spec.name)), None
        return release.stored(spec.name)

    _write(config, layout, Path(folder), value_of, copy_small_files(release.folder), shard_bytes)


def make_release(
    config: ModelConfig, seed: int, layout: Layout, folder: Path | str, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a random release, one tensor in memory at a time; equal seeds give equal bytes.

    Matrices have a standard deviation of fan_in ** -0.5, so that logits come out of order 1.

    Raises:
        ConfigError: the layout does not fit the model.
        SaveError: the file system refused; nothing was written.
    """
    config, layout = with_layout(config, layout)

    def value_of(spec: TensorSpec) -> Value:
        return _random(config, spec, seed)

    _write(config, layout, Path(folder), value_of, _new_small_files(config), shard_bytes)


def _random(config: ModelConfig, spec: TensorSpec, seed: int) -> Value:
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    name = spec.name
    if name.endswith("tid2eid"):
        rows = torch.rand(spec.shape[0], config.n_routed_experts, generator=generator)
        return rows.topk(spec.shape[1]).indices, None
    if spec.format == "fp4":
        # every code equally often has a root mean square of about 3
        columns = spec.shape[1] * 2
        codes = torch.randint(0, 256, spec.shape, generator=generator, dtype=torch.uint8)
        exponent = -round(float(torch.log2(torch.tensor(9.0 * columns))) / 2) + 127
        jitter = torch.randint(-1, 2, (spec.shape[0], columns // 32), generator=generator)
        return codes, (jitter + exponent).to(torch.uint8)
    shape = spec.shape
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("norm.weight", "main_norm.weight")):
        return 1 + 0.1 * noise, None
    if len(shape) == 2 and not name.endswith("ape"):
        return noise * (1.0 if name == "embed.weight" else shape[-1] ** -0.5), None
    return 0.3 * noise, None
