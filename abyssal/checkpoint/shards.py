"""Read safetensors shards lazily, by position, without mapping them.

A mapped file counts as resident memory once touched, which would break `--max-memory`; and every header is
checked before a byte of it is believed. Format: 8 bytes of header length, JSON, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abyssal.arch.tensors import ITEM_BYTES
from abyssal.base.errors import CheckpointError

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        dtype: the header's dtype string.
        file, start, nbytes: its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


class Shards:
    """All tensors of a folder, by name.

    Args:
        folder: holds model.safetensors.index.json and its shards, or one or more *.safetensors files.
    Raises:
        CheckpointError: a file or header is wrong; the text names it.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        index = self._index()
        files = sorted(set(index.values())) if index is not None else self._plain_files()
        for name in files:
            for tensor in read_header(self.folder / name):
                other = self.tensors.get(tensor.name)
                if other is not None:
                    raise CheckpointError(
                        f"tensor {tensor.name} is in {other.file.name} and in {name}: keep one of them"
                    )
                self.tensors[tensor.name] = tensor
        for name, file in (index or {}).items():
            found = self.tensors.get(name)
            if found is None or found.file.name != Path(file).name:
                raise CheckpointError(f"{INDEX} says {name} is in {file}, where it is not: fetch the shards again")
        unlisted = [] if index is None else sorted(self.tensors.keys() - index.keys())
        if unlisted:
            raise CheckpointError(f"tensor {unlisted[0]} is in a shard but not in {INDEX}: fetch the index again")

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.exists():
            return None
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
            names = dict(weight_map)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors index ({error}): fetch it again") from None
        for file in names.values():
            if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
                raise CheckpointError(f"{path} points outside its folder, to {file!r}: do not trust this release")
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{path} names {file}, which is missing: fetch it")
        return names

    def _plain_files(self) -> list[str]:
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.folder} holds no .safetensors file: give the folder of a release")
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            CheckpointError: there is none of this name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {name}: fetch the release again") from None

    def read(self, name: str) -> Tensor:
        """A whole tensor, in its stored dtype."""
        info = self.info(name)
        return _tensor(info, _bytes(info.file, info.start, info.nbytes), info.shape)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last-1 of a tensor; only their bytes are read.

        Raises:
            CheckpointError: it has no such rows.
        """
        info = self.info(name)
        rows = info.shape[0] if info.shape else 0
        if not 0 <= first <= last <= rows:
            raise CheckpointError(f"{name} has {rows} rows: there are no rows {first} to {last}")
        row = info.nbytes // max(rows, 1)
        data = _bytes(info.file, info.start + first * row, (last - first) * row)
        return _tensor(info, data, (last - first, *info.shape[1:]))


def _tensor(info: StoredTensor, data: Tensor, shape: tuple[int, ...]) -> Tensor:
    return data.view(TORCH_DTYPES[info.dtype]).view(shape)


def _bytes(path: Path, start: int, count: int) -> Tensor:
    data = torch.empty(count, dtype=torch.uint8)  # aligned for the processor's widest loads
    view, done = data.numpy().data, 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < count:
                got = os.preadv(file.fileno(), [view[done:]], start + done)
                if not got:
                    raise CheckpointError(f"{path} ends {count - done} bytes too early: fetch it again")
                done += got
    except OSError as error:
        raise _unreadable(path, error) from error
    return data


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror}): check the file and its permissions")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise CheckpointError(f"tensor {key} is listed twice: fetch the file again")
        found[key] = value
    return found


def read_header(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is truncated, or its header is too long, no JSON, or contradicts the file.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file: fetch it again")
    length = int.from_bytes(bytes(_bytes(path, 0, 8).numpy()), "little")
    if length > LONGEST_HEADER or 8 + length > size:
        raise CheckpointError(
            f"{path} announces a header of {length:,} bytes in a file of {size:,}: it is damaged, fetch it again"
        )
    try:
        header = json.loads(bytes(_bytes(path, 8, length).numpy()), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON ({error}): fetch it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is a {type(header).__name__}, not an object: fetch it again")
    header.pop("__metadata__", None)
    data_start, end = 8 + length, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(path, *item)):
        tensor = _entry(path, name, entry, data_start)
        first, last = _offsets(path, name, entry)
        if first != end:
            raise CheckpointError(f"{path}: bytes of {name} start at {first}, not at {end}: fetch it again")
        end = last
        yield tensor
    if data_start + end != size:
        problem = "is truncated" if data_start + end > size else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {problem}: {size:,} bytes instead of {data_start + end:,}; fetch it again")


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    try:
        first, last = entry["data_offsets"]
        if type(first) is int and type(last) is int and 0 <= first <= last:
            return first, last
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{path}: {name} has no valid data_offsets: fetch it again")


def _entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}; abyssal reads {', '.join(TORCH_DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{path}: {name} has shape {shape!r}, not a list of sizes: fetch it again")
    first, last = _offsets(path, name, entry)
    if prod(shape) * ITEM_BYTES[dtype] != last - first:
        raise CheckpointError(f"{path}: {name} of {dtype} {shape} cannot have {last - first} bytes: fetch it again")
    return StoredTensor(name, dtype, tuple(shape), path, data_start + first, last - first)
