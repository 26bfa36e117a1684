"""What a name on the command line stands for: a folder, a preset, or the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import PRESETS, preset
from abyssal.base.errors import InputError
from abyssal.base.machine import this_machine

if TYPE_CHECKING:
    import torch

    from abyssal.encoding.tokenizer import Tokenizer
    from abyssal.engine.engine import Engine
    from abyssal.quant.numerics import Numerics

BUNDLED = "nano"


def bundled_folder() -> Path:
    """The folder of the model that comes with the package."""
    return Path(__file__).parent.parent / "models" / BUNDLED


def folder_of(name: str) -> Path:
    """The release folder of a model to run: a path, or `nano` for the bundled one.

    Raises:
        InputError: there is no such folder.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if name == BUNDLED:
        return bundled_folder()
    if name in PRESETS:
        raise InputError(f"{name} is a preset without weights: give the folder of its release")
    raise InputError(f"{name} is not a folder: give the folder of a release, or {BUNDLED} for the bundled model")


def config_of(name: str) -> ModelConfig:
    """The configuration of a preset, of a folder, or of a config.json.

    Raises:
        InputError: it is none of these.
    """
    path = Path(name)
    if path.is_file():
        return ModelConfig.from_file(path)
    if path.is_dir():
        return ModelConfig.from_file(path / "config.json")
    if name in PRESETS:
        return preset(name)
    raise InputError(f"{name} is no folder, file or preset: presets are {', '.join(PRESETS)}")


def open_model(name: str) -> tuple[Tokenizer, Engine]:
    """A release in memory: as float32 where that fits, else with FP4 and FP8 weights as stored.

    Raises:
        InputError: there is no such folder, or not even the stored weights fit.
        CheckpointError, ConfigError: the release is wrong.
    """
    from abyssal.arch.tensors import parameters, totals
    from abyssal.checkpoint.load import load_model
    from abyssal.checkpoint.release import Release
    from abyssal.encoding.tokenizer import Tokenizer
    from abyssal.engine.engine import Engine

    folder = folder_of(name)
    tokenizer = Tokenizer(folder)
    release = Release(folder)
    specs = release.specs.values()
    stored = totals(specs).nbytes
    room = this_machine().memory_available
    if stored > room:
        raise InputError(
            f"{name} holds {stored / 2**30:.1f} GiB of weights, {room / 2**30:.1f} GiB of memory are free:"
            " use `abyssal logits --max-memory`, which reads them layer by layer"
        )
    model = load_model(release, keep_quantised=4 * parameters(specs) > room)
    return tokenizer, Engine(model)


def dtype_and_numerics(dtype: str, mode: str) -> tuple[torch.dtype, Numerics]:
    """Parse --dtype and --mode.

    Raises:
        InputError: one of them is unknown.
    """
    import torch

    from abyssal.quant.numerics import MODES, Numerics

    dtypes = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise InputError(f"unknown dtype {dtype!r}: choose from {', '.join(dtypes)}")
    chosen = next((m for m in MODES if m == mode), None)
    if chosen is None:
        raise InputError(f"unknown mode {mode!r}: choose from {', '.join(MODES)}")
    return dtypes[dtype], Numerics.of(chosen)


def read_text(file: Path) -> str:
    """A text file that a user named.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from None


def parse_ids(text: str) -> list[int]:
    """Token ids separated by commas or blank space.

    Raises:
        InputError: something else is among them.
    """
    ids = []
    for word in text.replace(",", " ").split():
        if not word.lstrip("-").isdecimal():
            raise InputError(f"{word!r} is no token id: give integers separated by commas")
        ids.append(int(word))
    return ids


_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: str) -> int:
    """A size such as 4GiB or 512MiB.

    Raises:
        InputError: it is none.
    """
    number = text.strip().lower().rstrip("bikmg")
    unit = text.strip().lower()[len(number) :]
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"{text!r} is no size: write for example 4GiB or 512MiB") from None
