"""What a name on the command line stands for: a folder, a preset, or the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import PRESETS, preset
from abyssal.base.errors import InputError
from abyssal.base.home import home
from abyssal.base.machine import this_machine

if TYPE_CHECKING:
    import torch

    from abyssal.encoding.snapshots import Snapshot
    from abyssal.encoding.tokenizer import Tokenizer
    from abyssal.engine.disk_cache import DiskCache
    from abyssal.engine.engine import Engine
    from abyssal.quant.numerics import Numerics

DISK_BYTES = 16 << 30
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


def open_disk_cache() -> DiskCache:
    """The prefix cache on disk, at most a tenth of what is free there."""
    from abyssal.engine.disk_cache import DiskCache

    folder = home() / "prefix"
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    return DiskCache(folder, min(DISK_BYTES, this_machine(existing).disk_free // 10))


def open_model(
    name: str,
    *,
    cache_bytes: int | None = None,
    max_memory: int | None = None,
    disk: bool = True,
    policy: str = "periodic",
    mode: str = "exact",
) -> tuple[Tokenizer, Engine]:
    """A release in memory, with weights as stored where native kernels run or memory is short, else as float32; or
    with its experts on disk.

    Args:
        name: a folder, or the bundled model.
        cache_bytes: for the cache of all requests; by default half of what is free, or a small part of `max_memory`.
        max_memory: bytes of the whole process: experts are read from disk, and as many kept as there is room for.
        disk: whether prefixes are kept on disk too.
        policy: where window entries are kept.
        mode: numerics.

    Raises:
        InputError: there is no such folder, or not even the stored weights fit, or those beside the experts.
        CheckpointError, ConfigError: the release is wrong.
    """
    from abyssal.arch.tensors import parameters, totals
    from abyssal.checkpoint.disk_model import load_from_disk, plan_disk
    from abyssal.checkpoint.identity import identity_of
    from abyssal.checkpoint.load import load_model
    from abyssal.checkpoint.release import Release
    from abyssal.encoding.literals import EOS
    from abyssal.encoding.tokenizer import Tokenizer
    from abyssal.engine.engine import Engine
    from abyssal.engine.grammar import GrammarCompiler
    from abyssal.engine.prefix_cache import PrefixCache
    from abyssal.kernels.choice import native

    folder = folder_of(name)
    _, numerics = dtype_and_numerics("float32", mode)
    tokenizer = Tokenizer(folder)
    release = Release(folder)
    specs = release.specs.values()
    stored = totals(specs).nbytes
    room = this_machine().memory_available
    options: dict[str, Any] = {"budget": cache_bytes}
    if max_memory is not None:
        plan = plan_disk(release, numerics, max_memory, cache_bytes)
        model, experts = load_from_disk(release, plan.slots, numerics=numerics)
        options = {"budget": plan.cache, "slots": plan.sequences, "step_tokens": plan.tokens, "expert_use": experts.use}
    elif stored > room:
        raise InputError(
            f"{name} holds {stored / 2**30:.1f} GiB of weights, {room / 2**30:.1f} GiB of memory are free:"
            " give --max-memory, which reads experts from disk as they are used"
        )
    else:
        # native kernels read a stored weight sooner than its values; the bits are the same
        keep = native() is not None or 4 * parameters(specs) > room
        model = load_model(release, numerics=numerics, keep_stored=keep)
    cache = open_disk_cache() if disk else None
    engine = Engine(
        model,
        prefix=lambda memory: PrefixCache(memory, identity_of(folder), policy=policy, disk=cache),
        grammars=lambda: GrammarCompiler(folder / "tokenizer.json", model.config.vocab_size, tokenizer.special(EOS)),
        token_bytes=tokenizer.token_bytes,
        **options,
    )
    return tokenizer, engine


def snapshot_of(name: str) -> Snapshot:
    """Parse --snapshot.

    Raises:
        InputError: it is unknown.
    """
    from abyssal.encoding.snapshots import SNAPSHOTS

    known = next((s for s in SNAPSHOTS if s == name), None)
    if known is None:
        raise InputError(f"unknown snapshot {name!r}: choose from {', '.join(SNAPSHOTS)}")
    return known


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
