"""The memory of many sequences: the arrays of every layer, cut into pages and slots (architecture.md 5.7).

A page holds what grows: the compressed entries and index keys of `page_tokens` tokens, in all layers. A slot
holds what does not: the window ring and the compressors' rings of one sequence. Both are counted, so that
sequences can share them; whoever writes takes a copy first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind
from abyssal.base.errors import CapacityError
from abyssal.kvcache.codec import Codec
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide_dtype

PAGE_TOKENS = 128  # lcm of the block lengths 4 and 128
ALIGNMENT = 64  # bytes of a cache line
SLACK = 16  # positions that a sequence may be rewound without a fork: the longest draft

Rows = NDArray[np.int64]


def zeros(rows: int, width: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Zeros [rows, width]; on the CPU the system hands out the memory only when it is first touched."""
    count = rows * width * dtype.itemsize
    if not count or (device is not None and device.type != "cpu"):
        return torch.zeros(rows, width, dtype=dtype, device=device)
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[first : first + count]).view(dtype).view(rows, width)


def _resized(old: Tensor, rows: int) -> Tensor:
    if old.requires_grad:
        return torch.cat([old, old.new_zeros(rows - old.shape[0], old.shape[1])])
    new = zeros(rows, old.shape[1], old.dtype, old.device)
    new[: old.shape[0]] = old
    return new


class Ring:
    """The last `size` vectors of every slot: position p of slot s lies in row s * size + p % size."""

    def __init__(self, width: int, size: int, dtype: torch.dtype, device: torch.device | None):
        self.size = size
        self.data = zeros(0, width, dtype, device)

    def rows(self, slot: int, start: int, stop: int) -> Rows:
        """Rows of positions start .. stop - 1."""
        return slot * self.size + np.arange(start, stop, dtype=np.int64) % self.size

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.size * self.data.shape[1] * self.data.element_size()


class CompressedMemory:
    """What one compressor of one layer remembers.

    Attributes:
        ratio: tokens of a block.
        values, logits: rings of projected tokens that may still be pooled; CSA pools two blocks.
        codec: how an entry is stored.
        entries: one row for each block of each page, [1 + pages * page_tokens / ratio, width]; row 0 stays
            zero and stands for "no entry", so that a broken sequence cannot reach others through it.
    """

    def __init__(self, codec: Codec, ratio: int, page_tokens: int, device: torch.device | None):
        overlap = LayerKind.of(ratio) is LayerKind.CSA
        size = ratio * (2 if overlap else 1) + SLACK
        width = codec.dim * (2 if overlap else 1)
        wide = wide_dtype(codec.dtype)
        self.ratio = ratio
        self.codec = codec
        self.values = Ring(width, size, wide, device)
        self.logits = Ring(width, size, wide, device)
        self.per_page = page_tokens // ratio
        self.entries = zeros(1, codec.width, codec.stored_dtype, device)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.per_page * self.entries.shape[1] * self.entries.element_size()

    def page_rows(self, page: int) -> slice:
        """The rows of a page."""
        return slice(1 + page * self.per_page, 1 + (page + 1) * self.per_page)

    def read(self, rows: Tensor) -> Tensor:
        """Entries of these rows, decoded, [*rows.shape, C]."""
        return self.codec.decode(self.entries.index_select(0, rows.flatten())).unflatten(0, rows.shape)

    def read_run(self, rows: Rows) -> Tensor:
        """The same for a one-dimensional array of rows; consecutive rows are not copied."""
        first, count = int(rows[0]), len(rows)
        if int(rows[-1]) - first == count - 1 and bool((np.diff(rows) == 1).all()):
            return self.codec.decode(self.entries[first : first + count])
        return self.read(torch.from_numpy(rows))


class LayerMemory:
    """Arrays of one layer: the window, and what its kind adds.

    Attributes:
        ratio: tokens of a block; 0 for a window alone.
        codec: how window entries are stored.
        window: ring of window entries.
        compressed: compressed entries (CSA, HCA), or None.
        index: index keys (CSA), or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        ratio: int,
        numerics: Numerics,
        dtype: torch.dtype,
        page_tokens: int = PAGE_TOKENS,
        device: torch.device | None = None,
    ):
        C, R, J = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
        self.ratio = ratio
        self.codec = Codec("entry", numerics.entries, C, R, dtype)
        self.window = Ring(self.codec.width, config.sliding_window + SLACK, self.codec.stored_dtype, device)
        self.compressed = CompressedMemory(self.codec, ratio, page_tokens, device) if ratio else None
        self.index: CompressedMemory | None = None
        if LayerKind.of(ratio) is LayerKind.CSA:
            self.index = CompressedMemory(Codec("key", numerics.index, J, R, dtype), ratio, page_tokens, device)

    def compressors(self) -> list[CompressedMemory]:
        """The compressors' memories that this kind of layer has."""
        return [memory for memory in (self.compressed, self.index) if memory is not None]

    def rings(self) -> list[Ring]:
        """Every ring of the layer."""
        return [self.window, *(ring for c in self.compressors() for ring in (c.values, c.logits))]

    def resize(self, slots: int, pages: int) -> None:
        """Make room for so many slots and pages; what is there stays."""
        for ring in self.rings():
            if slots * ring.size > ring.data.shape[0]:
                ring.data = _resized(ring.data, slots * ring.size)
        for memory in self.compressors():
            if 1 + pages * memory.per_page > memory.entries.shape[0]:
                memory.entries = _resized(memory.entries, 1 + pages * memory.per_page)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return sum(ring.slot_bytes for ring in self.rings())

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return sum(memory.page_bytes for memory in self.compressors())


class Counted:
    """Numbered places with reference counts; a place is free when nobody holds it.

    Attributes:
        holders: how many hold each place.
        free: places that nobody holds.
    """

    def __init__(self, kind: str, count: int, bounded: bool):
        self.kind = kind
        self.bounded = bounded
        self.holders = np.zeros(count, np.int32)
        self.free = count

    @property
    def count(self) -> int:
        """Places there are."""
        return len(self.holders)

    def take(self, count: int, after: int = -1) -> list[int]:
        """Hold `count` free places, in runs as long as possible, best right behind the place `after`.

        Runs let a long sequence be read without gathering its rows.

        Raises:
            CapacityError: too few are free.
        """
        if count > self.free:
            if self.bounded:
                raise CapacityError(f"{count} {self.kind} are needed, {self.free} of {self.count} are free")
            grown = max(count - self.free, self.count, 1)
            self.holders = np.concatenate([self.holders, np.zeros(grown, np.int32)])
            self.free += grown
        taken: list[int] = []
        while len(taken) < count:
            place = after + 1
            if not (0 < place < self.count and self.holders[place] == 0):
                place = _longest_run(self.holders == 0, count - len(taken), new=after < 0)
            self.holders[place] = 1
            taken.append(place)
            after = place
        self.free -= count
        return taken

    def hold(self, places: Sequence[int]) -> None:
        """One more holder for each place, which must be held already."""
        assert all(self.holders[place] > 0 for place in places)
        np.add.at(self.holders, list(places), 1)

    def drop(self, places: Sequence[int]) -> None:
        """One holder less for each place."""
        assert all(self.holders[place] > 0 for place in places)
        if len(places):
            np.subtract.at(self.holders, list(places), 1)
            self.free += int((self.holders[list(places)] == 0).sum())


def _longest_run(free: NDArray[np.bool_], wanted: int, new: bool) -> int:
    """Where to begin: the shortest run of free places that holds all, else the longest.

    A sequence that will grow begins in the middle of a run that is much longer than it needs, so that the one
    that ends before the run can grow as well.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], free.astype(np.int8), [0]])))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    fitting = lengths >= wanted
    best = int(np.argmin(np.where(fitting, lengths, 1 << 60))) if fitting.any() else int(np.argmax(lengths))
    start, spare = int(starts[best]), int(lengths[best]) - wanted
    return start + spare // 2 if new and start > 0 and spare > wanted else start


class Memory:
    """All layers' arrays, and who holds which page and slot.

    Args:
        config: the model's numbers.
        numerics: how entries and index keys are stored.
        pages, slots: how many there are at most; None lets the memory grow.
        page_tokens: tokens of a page, a multiple of 128.

    Attributes:
        layers: memory of the backbone blocks.
        mtp: memory of the MTP blocks, which have windows alone.
        pages, slots: counts of holders.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        pages: int | None = None,
        slots: int | None = None,
        page_tokens: int = PAGE_TOKENS,
    ):
        if page_tokens < 1 or page_tokens % PAGE_TOKENS:
            raise ValueError(f"a page of {page_tokens} tokens: use a multiple of {PAGE_TOKENS}")
        self.config = config
        self.numerics = numerics or Numerics()
        self.dtype = dtype
        self.page_tokens = page_tokens

        def layer(ratio: int) -> LayerMemory:
            return LayerMemory(config, ratio, self.numerics, dtype, page_tokens, device)

        self._layer = layer
        self.layers = [layer(ratio) for ratio in config.backbone_ratios]
        # DSpark's draft stages are another module, which is not run
        self.mtp = [layer(0) for _ in range(0 if config.dspark else config.num_nextn_predict_layers)]
        self.pages = Counted("pages", pages or 0, pages is not None)
        self.slots = Counted("slots", slots or 0, slots is not None)
        self._fit()

    def all_layers(self) -> list[LayerMemory]:
        """Backbone and MTP layers."""
        return [*self.layers, *self.mtp]

    def rings(self) -> Iterator[Ring]:
        """Every ring, in a fixed order."""
        for layer in self.all_layers():
            yield from layer.rings()

    def compressors(self) -> Iterator[CompressedMemory]:
        """Every compressor's memory, in a fixed order."""
        for layer in self.all_layers():
            yield from layer.compressors()

    def _fit(self) -> None:
        for layer in self.all_layers():
            layer.resize(self.slots.count, self.pages.count)

    def take_pages(self, count: int, after: int = -1) -> list[int]:
        """Hold free pages; a memory without a limit grows.

        Raises:
            CapacityError: too few are free.
        """
        taken = self.pages.take(count, after)
        self._fit()
        return taken

    def take_slot(self) -> int:
        """Hold a free slot.

        Raises:
            CapacityError: none is free.
        """
        (slot,) = self.slots.take(1)
        self._fit()
        return slot

    def copy_page(self, source: int, target: int) -> None:
        """Copy the contents of a page."""
        for memory in self.compressors():
            memory.entries[memory.page_rows(target)] = memory.entries[memory.page_rows(source)]

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the contents of a slot."""
        for ring in self.rings():
            n = ring.size
            ring.data[target * n : (target + 1) * n] = ring.data[source * n : (source + 1) * n]

    def clear_layer(self, number: int) -> None:
        """Give back the arrays of a backbone layer that has done its work (layer-by-layer passes)."""
        self.layers[number] = self._layer(self.config.backbone_ratios[number])

    def empty_layer(self, ratio: int) -> LayerMemory:
        """Arrays of one more layer, with this memory's pages and slots."""
        layer = self._layer(ratio)
        layer.resize(self.slots.count, self.pages.count)
        return layer

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page_tokens)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all layers."""
        return sum(layer.page_bytes for layer in self.all_layers())

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot over all layers."""
        return sum(layer.slot_bytes for layer in self.all_layers())
