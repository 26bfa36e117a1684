"""Checkpoints of a run: whole or not there at all, checked when they are read (training.md 7).

    RUN/step_00001200/model.safetensors    float32 masters, router bias and tables among them
                      optim.safetensors    buffers of the optimisers, named like the parameters
                      state.json           the rest, and the SHA-256 of both files
    RUN/latest                             the name of the last one that is whole
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import abyssal
from abyssal.base.errors import CheckpointError, SaveError
from abyssal.base.files import sha256_of, write_bytes, write_folder, write_json

LATEST = "latest"
MODEL, OPTIM, STATE = "model.safetensors", "optim.safetensors", "state.json"
KEPT = 2  # a spike goes back to one of them


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        model: parameters and buffers by name.
        optim: buffers of the optimisers by name.
        state: what JSON can hold: step, recipe, cursors.
    """

    model: Mapping[str, Tensor]
    optim: Mapping[str, Tensor]
    state: Mapping[str, Any]


@cache
def made_with() -> dict[str, str | None]:
    """Versions of what takes part, and the commit of the sources where they lie in a repository."""
    ask = ["git", "-C", str(Path(abyssal.__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "abyssal": abyssal.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # its own form of an OSError
        raise SaveError(f"cannot write {path.name}: {error}; the checkpoints before are unchanged") from error


def name_of(step: int) -> str:
    """Of the folder of a checkpoint."""
    return f"step_{step:08d}"


def save(run: Path, step: int, saved: Saved, kept: int = KEPT) -> Path:
    """Write a checkpoint, name it as the latest, and remove all but the last ones.

    A process killed at any moment leaves `latest` at a whole checkpoint.

    Args:
        run: folder of the run.
        step: steps that are done.
        saved: what to write.
        kept: checkpoints that stay.
    Returns:
        its folder.
    Raises:
        SaveError: the file system refused; the checkpoints before are unchanged.
    """
    folder = run / name_of(step)
    with write_folder(folder) as aside:
        _write_tensors(aside / MODEL, saved.model)
        _write_tensors(aside / OPTIM, saved.optim)
        digests = {name: sha256_of(aside / name) for name in (MODEL, OPTIM)}
        write_json(aside / STATE, {**saved.state, "made_with": made_with(), "sha256": digests})
    write_bytes(run / LATEST, f"{folder.name}\n".encode())
    # and what a killed process left half written
    for old in (*sorted(run.glob("step_????????"))[:-kept], *run.glob(".step_*")):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """Folder of the last checkpoint that is whole, or None where nothing was saved.

    Raises:
        CheckpointError: `latest` names a folder that is not there.
    """
    try:
        name = (run / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    folder = run / name
    if not name or not (folder / STATE).is_file():
        raise CheckpointError(f"{run / LATEST} names {name!r}, which is no checkpoint: write a whole one's name there")
    return folder


def load(folder: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    try:
        state = json.loads((folder / STATE).read_bytes())
        digests = state["sha256"]
        for name in (MODEL, OPTIM):
            if sha256_of(folder / name) != digests[name]:
                raise CheckpointError(f"{folder / name} is not what was saved: its SHA-256 differs; take another step")
        return Saved(load_file(folder / MODEL), load_file(folder / OPTIM), state)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}; take another step") from error
