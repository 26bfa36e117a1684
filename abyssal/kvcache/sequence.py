"""One sequence in a memory: its page table, its slot and its position (architecture.md 2.9)."""

from __future__ import annotations

import numpy as np

from abyssal.arch.schedule import LayerKind
from abyssal.kvcache.memory import SLACK, Memory, Rows


class SequenceCache:
    """What one sequence remembers.

    A new sequence is a new conversation: nothing of an earlier one can leak into it (architecture.md 2.9,
    "Reset the state"), because rows are only read at positions that this sequence has written.

    Attributes:
        memory: where its pages and its slot lie.
        position: tokens seen so far.
        pages: page numbers; page i holds the blocks of tokens i * page_tokens and on.
        slot: number of its slot.
        since: first position whose ring rows are present; above 0 only while a prefix is recomputed.
        known: entries of blocks that end at or before this position are there already and are not written.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.position = 0
        self.pages: list[int] = []
        self._table: Rows | None = None
        self.since = 0
        self.known = 0
        self._highest = 0
        self.slot = memory.take_slot()

    def reserve(self, tokens: int) -> None:
        """Make sure that the next tokens can be written: pages are there, and nobody shares what is written.

        Raises:
            CapacityError: pages or slots are lacking; nothing has changed that matters.
        """
        memory = self.memory
        if memory.slots.holders[self.slot] > 1:
            slot = memory.take_slot()
            memory.copy_slot(self.slot, slot)
            memory.slots.drop([self.slot])
            self.slot = slot
        self.extend(memory.pages_for(self.position + tokens) - len(self.pages))
        first = max(self.position, self.known) // memory.page_tokens
        for i in range(first, memory.pages_for(self.position + tokens)):
            if memory.pages.holders[self.pages[i]] > 1:
                (page,) = memory.take_pages(1)
                memory.copy_page(self.pages[i], page)
                memory.pages.drop([self.pages[i]])
                self.pages[i] = page
                self._table = None

    def extend(self, pages: int) -> None:
        """Hold so many more pages at the end, for a prompt whose length is known.

        Raises:
            CapacityError: too few are free.
        """
        if pages > 0:
            self.pages += self.memory.take_pages(pages, self.pages[-1] if self.pages else -1)
            self._table = None

    def advance(self, tokens: int) -> None:
        """The next tokens have been written."""
        self.position += tokens
        self._highest = max(self._highest, self.position)
        if self.position >= self.known:
            self.since = 0  # the rings are whole again

    def fork(self) -> SequenceCache:
        """A second sequence with the same past; pages and slot are shared until one of the two writes."""
        other = SequenceCache.__new__(SequenceCache)
        other.memory, other.position, other.pages, other.slot = self.memory, self.position, [*self.pages], self.slot
        other.since, other.known, other._highest = self.since, self.known, self._highest
        other._table = None
        self.memory.pages.hold(self.pages)
        self.memory.slots.hold([self.slot])
        return other

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on; the rings still hold what was before.

        Raises:
            ValueError: the position lies ahead, or too far back for the rings; fork before long drafts.
        """
        if not max(self._highest - SLACK, self.since, 0) <= position <= self.position:
            raise ValueError(
                f"cannot rewind from token {self.position} to {position}: the rings hold {SLACK} tokens back"
                f" from {self._highest}; fork the sequence for more"
            )
        self.position = position

    def release(self) -> None:
        """Give pages and slot back; the sequence must not be used afterwards."""
        self.memory.pages.drop(self.pages)
        self.memory.slots.drop([self.slot])
        self.pages = []
        self.slot = -1

    def attach(self, pages: list[int], position: int) -> None:
        """Begin at `position` of a known prefix whose entries lie in `pages`, which are shared.

        The rings are not there yet: see `abyssal.kvcache.image`, or recompute the last tokens.

        Raises:
            ValueError: this sequence has begun already, or the pages do not cover the prefix.
        """
        if self.position or self.pages:
            raise ValueError(f"this sequence is at token {self.position}: attach a prefix to a new one")
        if len(pages) * self.memory.page_tokens < position:
            raise ValueError(f"{len(pages)} pages do not hold {position} tokens: give more")
        self.memory.pages.hold(pages)
        self.pages = [*pages]
        self._table = None
        self.position = self.since = self.known = self._highest = position

    def recompute_from(self, start: int) -> None:
        """Go back to `start` and read tokens again to fill the rings; known entries stay as they are."""
        assert 0 <= start <= self.position and start % self.memory.page_tokens == 0
        self.position = self.since = start

    def block_rows(self, blocks: Rows, ratio: int) -> Rows:
        """Rows of compressed blocks in the arrays of the layers with this ratio."""
        per_page = self.memory.page_tokens // ratio
        return 1 + self.table[blocks // per_page] * per_page + blocks % per_page

    @property
    def table(self) -> Rows:
        """The page numbers as an array; made again when pages have been added or replaced."""
        if self._table is None:
            self._table = np.asarray(self.pages, np.int64)
        return self._table

    @property
    def growing_bytes(self) -> int:
        """Bytes of entries and index keys of the blocks that are complete."""
        total = 0
        for memory in self.memory.compressors():
            row = memory.entries.shape[1] * memory.entries.element_size()
            total += self.position // memory.ratio * row
        return total

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the slot."""
        return self.memory.slot_bytes


def history(position: int, ratio: int) -> int:
    """First position whose projections a compressor still needs for tokens from `position` on."""
    overlap = LayerKind.of(ratio) is LayerKind.CSA
    return max(0, (position // ratio - (1 if overlap else 0)) * ratio)
