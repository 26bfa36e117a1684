"""Checkpoints that several processes write together: torch's Distributed Checkpoint (training.md 7)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards

from abyssal.base.errors import AbyssalError, CheckpointError, SaveError
from abyssal.base.files import sha256_of, write_folder
from abyssal.train.checkpoint import (
    MODEL,
    OPTIM,
    Saved,
    apart,
    broken,
    joint,
    name_latest,
    name_of,
    read_state,
    write_state,
)
from abyssal.train.parallel.parts import part_of, spread_like
from abyssal.train.parallel.whole import sized
from abyssal.train.world import World, local


def together(world: World, failure: str | None, kind: type[AbyssalError]) -> None:
    """Go on if no process has failed; else all raise, so that none waits for the others.

    Raises:
        the given kind: with the text of the first failure.
    """
    failures: list[str | None] = [None] * world.size
    dist.all_gather_object(failures, failure)
    for text in failures:
        if text is not None:
            raise kind(text)


def save(world: World, run: Path, step: int, saved: Saved, kept: int) -> Path:
    """Write a checkpoint, each process its part; see `checkpoint.save`.

    Raises:
        SaveError: on all processes, if the file system refused one.
    """
    folder = run / name_of(step)
    with ExitStack() as stack:
        aside, failure = None, None
        if world.rank == 0:
            try:
                aside = stack.enter_context(write_folder(folder))
            except SaveError as error:
                failure = str(error)
        together(world, failure, SaveError)
        aside = world.first(aside)
        assert aside is not None
        try:
            write_shards(dict(joint(saved)), storage_writer=FileSystemWriter(aside))
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise SaveError(f"cannot write {folder}: {first}; the checkpoints before are unchanged") from error
        written = sorted(path.name for path in aside.iterdir())
        mine = {name: sha256_of(aside / name) for name in written[world.rank :: world.size]}
        digests: list[dict[str, str]] = [{} for _ in range(world.size)]
        dist.all_gather_object(digests, mine)
        try:
            if world.rank == 0:
                write_state(aside, saved.state, {name: digest for some in digests for name, digest in some.items()})
                stack.close()
                name_latest(run, folder, kept)
        except SaveError as error:
            failure = str(error)
        together(world, failure, SaveError)
    return folder


def load(world: World, folder: Path, like: Saved) -> Saved:
    """Read a checkpoint, each process its part, whoever wrote it; see `checkpoint.load`.

    Args:
        world: all of its processes call this.
        folder: of the checkpoint.
        like: tensors spread as those to return shall be.
    Raises:
        CheckpointError: on all processes, if a file is missing, or is not what was written.
    """
    state, failure = None, None
    try:
        state = read_state(folder, slice(world.rank, None, world.size))
    except CheckpointError as error:
        failure = str(error)
    together(world, failure, CheckpointError)
    assert state is not None
    wanted = joint(like)
    if MODEL in state["sha256"]:
        return apart(_from_whole(folder, wanted), state)
    reader = FileSystemReader(folder)
    found: dict[str, Any] = {}
    for key, entry in sized(reader).items():
        if key in wanted:
            found[key] = torch.empty_like(wanted[key])
        else:  # such as what routers chose ahead: every process reads all
            found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        read_shards(found, storage_reader=reader)
    except CheckpointException as error:
        raise broken(folder, error) from error
    return apart(found, state)


def _from_whole(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts out of the files of a run on one process, tensor by tensor."""
    found = {}
    for head, file in (("model.", MODEL), ("optim.", OPTIM)):
        with safetensors.safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  no mapping
                whole = tensors.get_tensor(name)
                like = wanted.get(head + name)
                if like is None:
                    found[head + name] = whole
                else:
                    part = part_of(whole, like).to(local(like).device, copy=True)
                    found[head + name] = spread_like(part, like)
    return found
