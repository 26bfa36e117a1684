"""A checkpoint of several processes, read by one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_shards

from abyssal.base.errors import CheckpointError


def sized(reader: FileSystemReader) -> dict[str, Any]:
    """Key -> size and type of each tensor of a distributed checkpoint."""
    entries = reader.read_metadata().state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a distributed checkpoint, in one process.

    Raises:
        CheckpointError: the files contradict each other.
    """
    reader = FileSystemReader(folder)
    found: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in sized(reader).items()
    }
    try:
        with warnings.catch_warnings(action="ignore"):  # it says that there are no other processes
            read_shards(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}; take another step") from error
    return found
