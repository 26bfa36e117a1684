"""Checkpoints of a run: whole or not there at all, checked when they are read (training.md 7).

    RUN/step_00001200/model.safetensors    float32 masters, router bias and tables among them
                      optim.safetensors    buffers of the optimisers, named like the parameters
                      state.json           the rest, and the SHA-256 of all other files
    RUN/latest                             the name of the last one that is whole

Several processes write torch's Distributed Checkpoint (`*.distcp` and `.metadata`) in place of the safetensors
files, with the entries `model.NAME` and `optim.NAME`; any number of processes reads both.
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
        write_state(aside, saved.state, digests)
    name_latest(run, folder, kept)
    return folder


def write_state(folder: Path, state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write `state.json` beside the files with these digests."""
    write_json(folder / STATE, {**state, "made_with": made_with(), "sha256": digests})


def name_latest(run: Path, folder: Path, kept: int = KEPT) -> None:
    """Name a whole checkpoint as the latest, and remove all but the last ones."""
    write_bytes(run / LATEST, f"{folder.name}\n".encode())
    # and what a killed process left half written
    for old in (*sorted(run.glob("step_????????"))[:-kept], *run.glob(".step_*")):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


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


def read_state(folder: Path, part: slice = slice(None)) -> dict[str, Any]:
    """`state.json`, after checking the files beside it.

    Args:
        folder: of a checkpoint.
        part: which of the files to check, where several processes share the work.
    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    try:
        state = json.loads((folder / STATE).read_bytes())
        for name, digest in sorted(state["sha256"].items())[part]:
            if sha256_of(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is not what was saved: its SHA-256 differs; take another step")
        return state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(folder, error) from error


def broken(folder: Path, error: BaseException) -> CheckpointError:
    """What is raised where a checkpoint cannot be read."""
    return CheckpointError(f"{folder} is no whole checkpoint: {error}; take another step")


def load(folder: Path) -> Saved:
    """Read a checkpoint, all of it into this process, whoever wrote it.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    state = read_state(folder)
    try:
        if MODEL in state["sha256"]:
            return Saved(load_file(folder / MODEL), load_file(folder / OPTIM), state)
    except (OSError, safetensors.SafetensorError) as error:
        raise broken(folder, error) from error
    from abyssal.train.parallel.whole import read_whole  # torch's part of it takes seconds to import

    return apart(read_whole(folder), state)


def joint(saved: Saved) -> dict[str, Tensor]:
    """All tensors under the keys of a distributed checkpoint: `model.NAME` and `optim.NAME`."""
    return {f"model.{name}": x.detach() for name, x in saved.model.items()} | {
        f"optim.{name}": x for name, x in saved.optim.items()
    }


def apart(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Saved:
    """The way back."""
    model, optim = (
        {key.removeprefix(head): x for key, x in tensors.items() if key.startswith(head)}
        for head in ("model.", "optim.")
    )
    return Saved(model, optim, state)
