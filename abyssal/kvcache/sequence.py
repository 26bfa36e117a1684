"""The state of sequences that move in lockstep, over all layers (architecture.md 2.9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.arch.config import ModelConfig
from abyssal.arch.schedule import LayerKind
from abyssal.kvcache.codec import Codec
from abyssal.kvcache.store import GrowingStore, SlidingStore
from abyssal.kvcache.tail import Tail, TailSnapshot
from abyssal.quant.numerics import Numerics
from abyssal.quant.precision import wide_dtype


class CompressedState:
    """The tail of one compressor and the vectors that it has produced."""

    def __init__(self, tail: Tail, store: GrowingStore):
        self.tail = tail
        self.store = store

    def snapshot(self) -> TailSnapshot:
        """The tail; the store is cut back to the tail's number of blocks."""
        return self.tail.snapshot()

    def restore(self, snapshot: TailSnapshot) -> None:
        """Go back to a snapshot of this state."""
        self.tail.restore(snapshot)
        self.store.truncate(snapshot.blocks)


class LayerCache:
    """One layer's state: the window, and what its kind adds.

    Attributes:
        window: entries of the last tokens.
        compressed: entries of whole blocks (CSA, HCA), or None.
        index: index keys of whole blocks (CSA), or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        ratio: int,
        numerics: Numerics,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        C, R = config.head_dim, config.qk_rope_head_dim
        entry = Codec("entry", numerics.entries, C, R, dtype)
        tail_dtype = wide_dtype(dtype)
        overlap = LayerKind.of(ratio) is LayerKind.CSA
        self.window = SlidingStore(entry, batch, config.sliding_window, device)
        self.compressed: CompressedState | None = None
        self.index: CompressedState | None = None
        if ratio:
            tail = Tail(batch, ratio, C, overlap, tail_dtype, device)
            self.compressed = CompressedState(tail, GrowingStore(entry, batch, device))
        if overlap:
            J = config.index_head_dim
            tail = Tail(batch, ratio, J, overlap, tail_dtype, device)
            key = Codec("key", numerics.index, J, R, dtype)
            self.index = CompressedState(tail, GrowingStore(key, batch, device))

    def states(self) -> list[CompressedState]:
        """The compressor states that this kind of layer has."""
        return [state for state in (self.compressed, self.index) if state is not None]

    @property
    def growing_bytes(self) -> int:
        """Bytes that grow with the context: compressed entries and index keys."""
        return sum(state.store.nbytes for state in self.states())

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not: window and tails."""
        return self.window.nbytes + sum(state.tail.nbytes for state in self.states())


@dataclass(frozen=True)
class Snapshot:
    """What `SequenceCache.restore` needs; entries that only grow are not copied."""

    position: int
    windows: tuple[Tensor, ...]
    tails: tuple[TailSnapshot, ...]


class SequenceCache:
    """Everything that `batch` sequences of equal length remember.

    Sequences of different lengths have a cache each. A new cache is a new conversation: nothing of an
    earlier one can leak into it (architecture.md 2.9, "Reset the state").

    Attributes:
        position: tokens seen so far.
        layers: state of the backbone blocks.
        mtp: state of the MTP blocks, which see one token less.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics | None = None,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        numerics = numerics or Numerics()
        self.batch = batch
        self.position = 0
        self.layers = [
            LayerCache(config, ratio, numerics, batch, dtype, device) for ratio in config.backbone_ratios
        ]
        depth = config.num_nextn_predict_layers
        self.mtp = [LayerCache(config, 0, numerics, batch, dtype, device) for _ in range(depth)]

    def _all(self) -> list[LayerCache]:
        return [*self.layers, *self.mtp]

    def snapshot(self) -> Snapshot:
        """A point to come back to, at the cost of a copy of windows and tails."""
        return Snapshot(
            self.position,
            tuple(layer.window.copy_kept() for layer in self._all()),
            tuple(state.snapshot() for layer in self._all() for state in layer.states()),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Forget every token that came after the snapshot.

        Raises:
            ValueError: the snapshot lies ahead of this cache.
        """
        if snapshot.position > self.position:
            raise ValueError(f"snapshot at token {snapshot.position} lies ahead of the cache at {self.position}")
        states = [state for layer in self._all() for state in layer.states()]
        for layer, kept in zip(self._all(), snapshot.windows, strict=True):
            layer.window.restore(kept)
        for state, tail in zip(states, snapshot.tails, strict=True):
            state.restore(tail)
        self.position = snapshot.position

    @property
    def growing_bytes(self) -> int:
        """Bytes held that grow with the context."""
        return sum(layer.growing_bytes for layer in self._all())

    @property
    def fixed_bytes(self) -> int:
        """Bytes held that do not."""
        return sum(layer.fixed_bytes for layer in self._all())

