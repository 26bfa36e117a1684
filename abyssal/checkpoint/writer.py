"""Write shards tensor by tensor, so that a release never has to fit into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor

from abyssal.arch.tensors import TensorSpec
from abyssal.base.errors import SaveError
from abyssal.base.files import write_json
from abyssal.checkpoint.shards import INDEX, TORCH_DTYPES

SHARD_BYTES = 4 * 2**30


def _grouped(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if size + spec.nbytes > limit and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _header(specs: list[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Shards of the official naming, and their index.

    Headers come first in a shard, so the tensors must be known beforehand and arrive in that order. Use it
    inside `base.files.write_folder`, which makes the folder appear whole or not at all.

    Args:
        folder: an existing folder.
        specs: every tensor, in order.
        shard_bytes: largest size of a shard's data.
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self._shards = _grouped(specs, shard_bytes)
        self._expected = self._walk()
        self._file: IO[bytes] | None = None
        self._open_shard = -1
        self._map: dict[str, str] = {}
        self._size = 0

    def _walk(self) -> Iterator[tuple[int, TensorSpec]]:
        for number, specs in enumerate(self._shards):
            for spec in specs:
                yield number, spec

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            SaveError: it is not the one that was announced, or has another dtype or shape.
            OSError: the file system refused.
        """
        number, spec = next(self._expected, (-1, None))
        if spec is None or spec.name != name:
            raise SaveError(f"tensor {name} came where {spec.name if spec else 'the end'} was announced")
        if TORCH_DTYPES[spec.dtype] != tensor.dtype or spec.shape != tuple(tensor.shape):
            raise SaveError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced {spec.dtype} {list(spec.shape)}")
        if number != self._open_shard:
            self._start(number)
        assert self._file is not None
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._map[name] = self._name(number)
        self._size += spec.nbytes

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _start(self, number: int) -> None:
        if self._file is not None:
            self._file.close()
        self._open_shard = number
        self._file = (self.folder / self._name(number)).open("wb")
        self._file.write(_header(self._shards[number]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            left = next(self._expected, None)
            if left is not None:
                raise SaveError(f"tensor {left[1].name} was announced and never written")
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._size}, "weight_map": self._map})
