"""Copies of pages and rings, in memory and as bytes: what saved sequences and prefix caches are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from abyssal.base.errors import InputError
from abyssal.base.files import write_bytes
from abyssal.kvcache.memory import Memory, Ring, Rows
from abyssal.kvcache.sequence import SequenceCache, history

DIGEST_BYTES = 32
SAVED_KIND = "abyssal sequence 1"


def layout_of(memory: Memory) -> str:
    """A digest of everything that decides what the bytes of a page mean, but for the weights."""
    facts = [memory.config.to_dict(), asdict(memory.numerics), str(memory.dtype), memory.page_tokens]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _ring_rows(cache: SequenceCache, position: int) -> Iterator[tuple[Ring, Rows]]:
    """Every ring and the rows that tokens from `position` on still need."""
    window = cache.memory.config.sliding_window
    for layer in cache.memory.all_layers():
        yield layer.window, layer.window.rows(cache.slot, max(0, position - window + 1), position)
        for memory in layer.compressors():
            for ring in (memory.values, memory.logits):
                yield ring, ring.rows(cache.slot, history(position, memory.ratio), position)


def rings_at(cache: SequenceCache, position: int) -> list[Tensor]:
    """Copies of what the rings hold for tokens from `position` on; at most `SLACK` tokens back."""
    return [ring.data[torch.from_numpy(rows)] for ring, rows in _ring_rows(cache, position)]


def put_rings(cache: SequenceCache, rings: list[Tensor]) -> None:
    """Fill the rings of a sequence that stands where `rings_at` was taken.

    Raises:
        ValueError: the copies are of another position or another model.
    """
    places = list(_ring_rows(cache, cache.position))
    if [(len(rows), ring.data.shape[1]) for ring, rows in places] != [tuple(copy.shape) for copy in rings]:
        raise ValueError(f"these rings are not those of token {cache.position} of this model")
    for (ring, rows), copy in zip(places, rings, strict=True):
        ring.data[torch.from_numpy(rows)] = copy
    cache.since = 0


def page_at(memory: Memory, page: int) -> list[Tensor]:
    """Copies of a page in all layers."""
    return [c.entries[c.page_rows(page)].clone() for c in memory.compressors()]


def put_page(memory: Memory, page: int, copies: list[Tensor]) -> None:
    """Fill a page.

    Raises:
        ValueError: the copies are of another model.
    """
    places = list(memory.compressors())
    if [(c.per_page, c.entries.shape[1], c.entries.dtype) for c in places] != [(*t.shape, t.dtype) for t in copies]:
        raise ValueError("this page is of another model")
    for c, copy in zip(places, copies, strict=True):
        c.entries[c.page_rows(page)] = copy


def to_bytes(tensors: list[Tensor], facts: dict[str, str]) -> bytes:
    """Tensors and facts as a safetensors file with a SHA-256 behind it."""
    named = {f"{i:04d}": tensor.contiguous() for i, tensor in enumerate(tensors)}
    body = safetensors.torch.save(named, metadata=facts)
    return body + hashlib.sha256(body).digest()


def from_bytes(data: bytes) -> tuple[list[Tensor], dict[str, str]]:
    """What `to_bytes` was given.

    Raises:
        ValueError: the bytes are damaged.
    """
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if len(data) <= DIGEST_BYTES or hashlib.sha256(body).digest() != digest:
        raise ValueError("the checksum is wrong")
    named = safetensors.torch.load(body)
    size = int.from_bytes(body[:8], "little")
    facts = json.loads(body[8 : 8 + size])["__metadata__"]
    return [named[name] for name in sorted(named)], facts


def save(cache: SequenceCache, path: Path | str) -> None:
    """Write a sequence to a file: its pages, its rings and its position.

    Raises:
        SaveError: the file system refused; what was there before is unchanged.
    """
    tensors = rings_at(cache, cache.position)
    pages = np.asarray(cache.pages[: cache.memory.pages_for(cache.position)], np.int64)
    for c in cache.memory.compressors():
        rows = 1 + (pages[:, None] * c.per_page + np.arange(c.per_page)).flatten()
        tensors.append(c.entries[torch.from_numpy(rows)])
    facts = {"kind": SAVED_KIND, "layout": layout_of(cache.memory), "position": str(cache.position)}
    write_bytes(path, to_bytes(tensors, facts))


def load(memory: Memory, path: Path | str) -> SequenceCache:
    """A sequence that `save` wrote; the weights must be those that filled it.

    Raises:
        InputError: the file cannot be read, is damaged, or is of another model.
        CapacityError: the memory is bounded and full.
    """
    try:
        tensors, facts = from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is no saved sequence ({error}): save it again") from None
    if facts.get("kind") != SAVED_KIND or facts.get("layout") != layout_of(memory):
        raise InputError(f"{path} was saved with another model, numerics mode or page size: use those")
    cache = SequenceCache(memory)
    position = int(facts["position"])
    try:
        cache.reserve(position)
    except BaseException:
        cache.release()
        raise
    cache.advance(position)
    compressors = list(memory.compressors())
    put_rings(cache, tensors[: len(tensors) - len(compressors)])
    for c, copy in zip(compressors, tensors[len(tensors) - len(compressors) :], strict=True):
        for i, page in enumerate(cache.pages):
            c.entries[c.page_rows(page)] = copy[i * c.per_page : (i + 1) * c.per_page]
    return cache
