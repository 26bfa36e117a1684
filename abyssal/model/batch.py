"""Where the tokens of a pass stand, and which rows of the memory each of them reads and writes.

Tokens of all sequences lie one after another, [T, ...], without padding inside: padding would be pooled into
compressed blocks and would shift their borders (architecture.md 2.9). Rows of nobody fill T up to a multiple
of `row_unit` at the end, because products over fewer rows add in another order (see `abyssal.kernels.linear`).

Index arrays are the same for all layers of a kind, so they are made once for a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from abyssal.arch.schedule import LayerKind
from abyssal.kernels.choice import native
from abyssal.kernels.linear import row_unit
from abyssal.kvcache.memory import Memory
from abyssal.kvcache.sequence import SequenceCache, history
from abyssal.model.recorder import Recorder
from abyssal.model.rope import Rope
from abyssal.quant.precision import wide_dtype


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a pass.

    Attributes:
        cache: the sequence's state.
        first: row of the first of them in the packed tensors.
        length: how many.
        start: position of the first of them in the sequence.
        since: first position whose ring rows are present.
        skips: for each position of the sequence, how much further it is turned; None for no skips.
    """

    cache: SequenceCache
    first: int
    length: int
    start: int
    since: int
    skips: NDArray[np.int64] | None = None

    def places(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where positions of the sequence stand for the rotations."""
        return positions if self.skips is None else positions + self.skips[positions]


@dataclass(frozen=True)
class Group:
    """Neighbouring spans of equal length, which are computed side by side.

    Attributes:
        first: row of the first token.
        length: tokens of each span.
        spans: the spans.
    """

    first: int
    length: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> slice:
        """Their rows in the packed tensors."""
        return slice(self.first, self.first + self.length * len(self.spans))

    def take(self, x: Tensor) -> Tensor:
        """Their rows of x [T, ...] as [G, S, ...]."""
        return x[self.rows].unflatten(0, (len(self.spans), self.length))


@dataclass(frozen=True)
class WindowPlan:
    """Which window entries each token reads.

    The entries are looked up in one array: a zero row, the `sources` rows of the ring, the pass's own T rows.

    Attributes:
        sources: ring rows of earlier tokens.
        index: [A, W] places in that array, oldest first, 0 where there is none; A >= 2 rows.
        mask: [A, W], True where there is one.
        written: rows of the pass that stay in the ring, and the ring rows they go to.
    """

    sources: Tensor
    index: Tensor
    mask: Tensor
    written: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BlockPlan:
    """Which compressed blocks the tokens complete, for one ratio.

    Attributes:
        places: [T] place of each token in its block.
        written: as in `WindowPlan`, for the compressors' rings.
        sources: ring rows of earlier tokens that are pooled now.
        own, before: [N, M] places of a block's tokens and of those of the block before it (CSA) in: an absent
            row, the `sources`, the pass's own rows. None where no block is complete or none is needed.
        starts: [N] position of each block's first token, for the rotations.
        kept: numbers of the blocks to store, or None for all; a recomputed block may be stored already.
        entry_rows: where they go.
    """

    places: Tensor
    written: tuple[Tensor, Tensor]
    sources: Tensor
    own: Tensor | None
    before: Tensor | None
    starts: Tensor
    kept: Tensor | None
    entry_rows: Tensor


def _tensor(rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows))


_NOTHING = np.zeros(0, np.int64)


class Batch:
    """The tokens of one pass.

    Args:
        caches: the sequences' states; their pages and slots must be reserved.
        lengths: tokens of each.
        starts: position of the first token of each; by default where the state stands.
        since: first position whose ring rows are present; by default as the state says. The MTP block's differ.
        skips: for some sequences, how much further each position is turned than it stands, [start + length or
            more]. Rotations alone follow it: windows, blocks and what a token sees go by the number of tokens. It
            may change at multiples of the largest block alone, and must be the same in all passes of a sequence.

    Attributes:
        spans: where each sequence's tokens lie.
        count: tokens.
        padded: rows of the packed tensors, the next multiple of `unit`.
        unit: rows of which products are a multiple.
        positions: [padded], of the rotations; 0 for rows of nobody.
        watched: where the indexers of the CSA layers note what the last token of each span reads, or None.
        recorder: what a trainer asks and notes, or None.
    """

    def __init__(
        self,
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        starts: Sequence[int] | None = None,
        since: Sequence[int] | None = None,
        skips: Sequence[NDArray[np.int64] | None] | None = None,
    ):
        starts = [cache.position for cache in caches] if starts is None else starts
        since = [cache.since for cache in caches] if since is None else since
        skips = [None] * len(caches) if skips is None else skips
        self.spans: list[Span] = []
        first = 0
        for cache, length, start, present, skip in zip(caches, lengths, starts, since, skips, strict=True):
            self.spans.append(Span(cache, first, length, start, present, skip))
            first += length
        self.memory: Memory = caches[0].memory
        self.count = first
        dtype = self.memory.dtype
        self.unit = max(row_unit(dtype), row_unit(wide_dtype(dtype)))
        # native products need no rows of nobody
        full = native() is not None and dtype == torch.float32 and caches[0].memory.all_layers()[0].window.data.is_cpu
        few = first if not torch.is_grad_enabled() else max(first, 2)
        self.padded = few if full else -(-first // self.unit) * self.unit
        # a product over a batch of one takes another path
        self.attending = max(first, 2)
        self._positions = np.zeros(self.padded, np.int64)
        for span in self.spans:
            self._positions[span.first : span.first + span.length] = np.arange(span.start, span.start + span.length)
        turned = self._positions
        if any(skip is not None for skip in skips):
            turned = turned.copy()
            for span in self.spans:
                part = slice(span.first, span.first + span.length)
                turned[part] = span.places(self._positions[part])
        self.positions = torch.from_numpy(turned)
        self.watched: list[list[NDArray[np.int64]]] | None = None
        self.recorder: Recorder | None = None
        self._blocks: dict[int, BlockPlan] = {}
        self._visible: dict[int, Tensor] = {}
        self._turns: dict[tuple[int, Rope], Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._few: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def pad(self, x: Tensor) -> Tensor:
        """x [count, ...] with rows of nobody behind it, [padded, ...]."""
        if self.padded == self.count:
            return x
        return torch.cat([x, x.new_zeros(self.padded - self.count, *x.shape[1:])])

    @cached_property
    def groups(self) -> list[Group]:
        """Neighbouring spans of equal length."""
        found: list[list[Span]] = []
        for span in self.spans:
            if found and found[-1][0].length == span.length:
                found[-1].append(span)
            else:
                found.append([span])
        return [Group(spans[0].first, spans[0].length, tuple(spans)) for spans in found]

    @property
    def topk(self) -> int:
        """How many blocks a query of a CSA layer reads at most."""
        asked = None if self.recorder is None else self.recorder.topk
        return self.memory.config.index_topk if asked is None else asked

    def visible(self, ratio: int) -> NDArray[np.int64]:
        """[count] blocks that each token sees; it sees the one that it completes (architecture.md 2.8)."""
        return (self._positions[: self.count] + 1) // ratio

    def most_visible(self, ratio: int) -> int:
        """The most blocks that a token sees."""
        return int(self.visible(ratio).max())

    def note(self, ratio: int, chosen_TK: Tensor | None) -> None:
        """Keep, if it is watched, what the last token of each span reads: chosen blocks, or all that it sees."""
        if self.watched is None:
            return
        last = [span.first + span.length - 1 for span in self.spans]
        if chosen_TK is None:
            self.watched.append([np.arange(self.visible(ratio)[row]) for row in last])
        else:
            self.watched.append([chosen_TK[row][chosen_TK[row] >= 0].numpy() for row in last])

    @cached_property
    def table_GP(self) -> Tensor:
        """Page numbers of each span's sequence, filled up with zeros."""
        table = np.zeros((len(self.spans), max(len(span.cache.pages) for span in self.spans)), np.int64)
        for row, span in zip(table, self.spans, strict=True):
            row[: len(span.cache.pages)] = span.cache.table
        return torch.from_numpy(table)

    @cached_property
    def spans_G6(self) -> Tensor:
        """The spans as numbers: first row, length, start, since, slot, known."""
        return torch.tensor(
            [(s.first, s.length, s.start, s.since, s.cache.slot, s.cache.known) for s in self.spans]
        )

    def block_turns(self, ratio: int, rope: Rope) -> Tensor:
        """Rotations [N, R/2] at the first token of each block that the tokens complete, made once for a pass."""
        if (ratio, rope) not in self._turns:
            starts = [
                span.places(np.arange(span.start // ratio, (span.start + span.length) // ratio) * ratio)
                for span in self.spans
            ]
            self._turns[ratio, rope] = rope.at(torch.from_numpy(np.concatenate(starts)))
        return self._turns[ratio, rope]

    @cached_property
    def firsts(self) -> Tensor:
        """[G + 1] first row of each span, and the number of tokens."""
        return torch.tensor([*(span.first for span in self.spans), self.count])

    def visible_Q(self, ratio: int) -> Tensor:
        """`visible` as a tensor, made once for a pass."""
        if ratio not in self._visible:
            self._visible[ratio] = torch.from_numpy(self.visible(ratio))
        return self._visible[ratio]

    @cached_property
    def window(self) -> WindowPlan:
        """Window entries of each token."""
        W = self.memory.config.sliding_window
        ring = self.memory.all_layers()[0].window
        earlier = [max(span.since, span.start - W + 1, 0) for span in self.spans]
        sources = [
            ring.rows(span.cache.slot, begin, span.start) for span, begin in zip(self.spans, earlier, strict=True)
        ]
        index = np.zeros((self.attending, W), np.int64)
        held, own = 1, 1 + sum(map(len, sources))
        for span, rows in zip(self.spans, sources, strict=True):
            n = len(rows)
            seen = np.zeros(W - 1 + span.length, np.int64)
            seen[W - 1 - n : W - 1] = np.arange(held, held + n)
            seen[W - 1 :] = np.arange(own + span.first, own + span.first + span.length)
            index[span.first : span.first + span.length] = sliding_window_view(seen, W)
            held += n
        return WindowPlan(
            _tensor(np.concatenate(sources)),
            _tensor(index),
            torch.from_numpy(index > 0),
            self._written(ring.size, lambda span, begin, stop: ring.rows(span.cache.slot, begin, stop)),
        )

    def _written(self, size: int, rows_of) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        source, target = [], []
        for span in self.spans:
            kept = min(span.length, size)
            stop = span.start + span.length
            source.append(np.arange(span.first + span.length - kept, span.first + span.length))
            target.append(rows_of(span, stop - kept, stop))
        return _tensor(np.concatenate(source)), _tensor(np.concatenate(target))

    def blocks(self, ratio: int) -> BlockPlan:
        """Blocks of this ratio that the tokens complete."""
        if ratio not in self._blocks:
            self._blocks[ratio] = self._plan_blocks(ratio)
        return self._blocks[ratio]

    def _plan_blocks(self, ratio: int) -> BlockPlan:
        overlap = LayerKind.of(ratio) is LayerKind.CSA
        layer = self.memory.layers[self.memory.config.backbone_ratios.index(ratio)]
        assert layer.compressed is not None
        ring = layer.compressed.values
        sources, own, before, starts, targets, kept = [], [], [], [], [], []
        complete = [(s.start // ratio, (s.start + s.length) // ratio) for s in self.spans]
        begins = [
            max(history(s.start, ratio), s.since) if stop > first else s.start
            for s, (first, stop) in zip(self.spans, complete, strict=True)
        ]
        held, fresh = 1, 1 + sum(s.start - b for s, b in zip(self.spans, begins, strict=True))
        for span, (first, stop), begin in zip(self.spans, complete, begins, strict=True):
            if stop == first:
                continue
            sources.append(ring.rows(span.cache.slot, begin, span.start))
            # the place of every position from `begin` on; what lies before is absent
            base = max(0, (first - 1) * ratio)
            place = np.zeros(stop * ratio - base, np.int64)
            n = span.start - begin
            place[begin - base : span.start - base] = np.arange(held, held + n)
            place[span.start - base :] = np.arange(fresh + span.first, fresh + span.first + stop * ratio - span.start)
            held += n
            numbers = np.arange(first, stop)
            own.append(place[(first * ratio - base) :].reshape(-1, ratio))
            if overlap:
                earlier = place[: len(place) - ratio].reshape(-1, ratio)
                before.append(earlier if first else np.concatenate([np.zeros((1, ratio), np.int64), earlier]))
            starts.append(span.places(numbers * ratio))
            new = (numbers + 1) * ratio > span.cache.known
            kept.append(new)
            targets.append(span.cache.block_rows(numbers[new], ratio))
        new = np.concatenate(kept) if kept else np.zeros(0, np.bool_)
        return BlockPlan(
            torch.from_numpy(self._positions % ratio),
            self._written(ring.size, lambda span, begin, stop: ring.rows(span.cache.slot, begin, stop)),
            _tensor(np.concatenate(sources) if sources else _NOTHING),
            _tensor(np.concatenate(own)) if own else None,
            _tensor(np.concatenate(before)) if before else None,
            _tensor(np.concatenate(starts) if starts else _NOTHING),
            None if bool(new.all()) else _tensor(np.flatnonzero(new)),
            _tensor(np.concatenate(targets) if targets else _NOTHING),
        )

    def first_rows(self, ratio: int, k: int) -> tuple[Tensor, Tensor]:
        """Rows of the first k blocks of each token's sequence, [A, k], and which of them it sees.

        What a token reads that sees no more than k blocks.
        """
        if (ratio, k) not in self._few:
            rows = np.zeros((self.attending, k), np.int64)
            mask = np.zeros((self.attending, k), np.bool_)
            visible = self.visible(ratio)
            for span in self.spans:
                part = slice(span.first, span.first + span.length)
                most = min(int(visible[part].max()), k)
                rows[part, :most] = span.cache.block_rows(np.arange(most), ratio)
                mask[part] = np.arange(k) < visible[part, None]
            rows[~mask] = 0
            self._few[ratio, k] = torch.from_numpy(rows), torch.from_numpy(mask)
        return self._few[ratio, k]

    def seen_rows(self, ratio: int) -> Tensor:
        """Rows of all blocks that the last token of each span sees, [G, B], 0 for none; made once for a pass."""
        if ratio not in self._seen:
            most = [(span.start + span.length) // ratio for span in self.spans]
            rows = np.zeros((len(self.spans), max(most)), np.int64)
            for row, span, count in zip(rows, self.spans, most, strict=True):
                row[:count] = span.cache.block_rows(np.arange(count), ratio)
            self._seen[ratio] = torch.from_numpy(rows)
        return self._seen[ratio]

    def shared_rows(self, group: Group, ratio: int, begin: int, stop: int) -> NDArray[np.int64]:
        """Rows of blocks begin .. stop - 1 of each sequence of a group, [G, stop - begin], 0 for none."""
        rows = np.zeros((len(group.spans), stop - begin), np.int64)
        for i, span in enumerate(group.spans):
            most = min((span.start + span.length) // ratio, stop)
            if most > begin:
                rows[i, : most - begin] = span.cache.block_rows(np.arange(begin, most), ratio)
        return rows

    def rows_of_chosen(self, group: Group, ratio: int, blocks_GSK: Tensor) -> Tensor:
        """Rows of chosen blocks [G, S, K] of each sequence of a group; -1 becomes row 0."""
        per_page = self.memory.page_tokens // ratio
        most = max(len(span.cache.pages) for span in group.spans)
        table = np.zeros((len(group.spans), most), np.int64)
        for i, span in enumerate(group.spans):
            table[i, : len(span.cache.pages)] = span.cache.table
        numbers = blocks_GSK.clamp(min=0).flatten(1)
        pages = torch.from_numpy(table).gather(1, numbers // per_page)
        rows = (1 + pages * per_page + numbers % per_page).view(blocks_GSK.shape)
        return rows.masked_fill(blocks_GSK < 0, 0)
