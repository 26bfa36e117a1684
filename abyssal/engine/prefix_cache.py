"""Reuse of prompts that begin alike: a tree over pages of tokens, in memory and, if there is a disk cache, on disk.

A node is a page of 128 tokens after a certain past, and holds that page of the memory. Window and compressor
rings are kept at some nodes (architecture.md 5.7): "full" at every page that a pass ends on, "periodic" at every
so many tokens and at the end of a prompt, "zero" nowhere. Where they are missing, the last tokens are read
again: each layer needs a window's length more, and the compressed entries are there already. The result has
the same bits.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from abyssal.base.errors import CapacityError, InputError
from abyssal.engine.disk_cache import DiskCache
from abyssal.engine.request import PrefixUse
from abyssal.kvcache.image import layout_of, page_at, put_page, put_rings, rings_at
from abyssal.kvcache.memory import SLACK, Memory
from abyssal.kvcache.sequence import SequenceCache

Policy = Literal["full", "periodic", "zero"]
POLICIES: tuple[str, ...] = get_args(Policy)
REMEMBERED = 1 << 16  # keys of evicted pages, to tell "evicted" from "never seen"


@dataclass(eq=False)
class Node:
    """A page of tokens after a certain past.

    Attributes:
        key: digest of the past and these tokens.
        page: where their entries lie.
        rings: copies of the rings at the page's end, or None.
        used: when it was last looked at.
        depth: pages from the beginning, this one among them.
        dropped: no longer part of the tree.
    """

    key: bytes
    tokens: bytes
    parent: Node | None
    page: int
    children: dict[bytes, Node] = field(default_factory=dict)
    rings: list[Tensor] | None = None
    used: int = 0
    depth: int = 0
    dropped: bool = False


def _packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


class PrefixCache:
    """The tree.

    Args:
        memory: whose pages the nodes hold.
        identity: names the weights; pages on disk are only found again under the same name.
        policy: where rings are kept.
        period: tokens between them, a multiple of a page ("periodic").
        rings_budget: bytes of rings in memory.
        disk: where pages and rings are kept too, or None.

    Raises:
        InputError: policy or period are unknown or do not fit.
    """

    def __init__(
        self,
        memory: Memory,
        identity: str,
        *,
        policy: str = "periodic",
        period: int = 1024,
        rings_budget: int = 256 << 20,
        disk: DiskCache | None = None,
    ):
        if policy not in POLICIES:
            raise InputError(f"unknown window policy {policy!r}: choose from {', '.join(POLICIES)}")
        if period < 1 or period % memory.page_tokens:
            raise InputError(f"a period of {period} tokens: use a multiple of {memory.page_tokens}")
        self.memory = memory
        self.policy, self.period = policy, period
        self.disk = disk
        self._root = Node(hashlib.sha256(f"{identity} {layout_of(memory)}".encode()).digest(), b"", None, -1)
        self._clock = 0
        self._count = 0
        self._rings: deque[Node] = deque()
        self._rings_bytes, self._rings_budget = 0, rings_budget
        self._evicted: dict[bytes, None] = {}

    # what is there

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    @property
    def pages(self) -> int:
        """Pages that the tree holds."""
        return self._count

    def wants_rings(self, position: int, prompt: int) -> bool:
        """Whether rings are to be kept at a page's end while a prompt of this length is read."""
        if self.policy == "full":
            return True
        last = (prompt - 1) // self.memory.page_tokens * self.memory.page_tokens
        return self.policy == "periodic" and (position % self.period == 0 or position == last)

    def stop_before(self, position: int, prompt: int) -> int:
        """The next position from `position` on at which a pass should end, so that rings can be taken."""
        size = self.memory.page_tokens
        if self.policy == "zero":
            return prompt
        if self.policy == "full":
            return (position // size + 1) * size
        last = (prompt - 1) // size * size
        stop = (position // self.period + 1) * self.period
        return min(stop, last) if position < last else stop

    # use

    def attach(self, cache: SequenceCache, prompt: Sequence[int]) -> tuple[PrefixUse, Node]:
        """Let a new sequence begin behind the longest prefix of its prompt that is known.

        At least the last token is left to read. Returns what was found, and where to insert what follows.
        """
        nodes, reason = self._match(prompt)
        hit = len(nodes) * self.memory.page_tokens
        if not nodes:
            return PrefixUse(0, 0, len(prompt), reason), self._root
        cache.attach([node.page for node in nodes], hit)
        start = self._begin(cache, nodes, hit)
        return PrefixUse(hit, hit - start, len(prompt) - hit, reason), nodes[-1]

    def _begin(self, cache: SequenceCache, nodes: list[Node], hit: int) -> int:
        """Fill the rings from a copy, or go back as far as they need to be read again; where reading begins."""
        config, size = self.memory.config, self.memory.page_tokens
        reach = config.sliding_window * len(self.memory.all_layers())
        oldest = max(0, (hit - reach) // size * size)
        for node, end in zip(reversed(nodes), range(hit, oldest, -size), strict=False):
            if node.rings is None and self.disk is not None:
                node.rings = self.disk.get(_rings_key(node)).tensors
                if node.rings is not None:
                    self._keep(node)
            if node.rings is not None:
                cache.recompute_from(end)
                put_rings(cache, node.rings)
                return end
        cache.recompute_from(oldest)
        return oldest

    def _match(self, prompt: Sequence[int]) -> tuple[list[Node], str]:
        size = self.memory.page_tokens
        found: list[Node] = []
        node, reason = self._root, "the rest is shorter than a page"
        self._clock += 1
        for first in range(0, (len(prompt) - 1) // size * size, size):
            tokens = _packed(prompt[first : first + size])
            child = node.children.get(tokens)
            if child is None:
                child, why = self._from_disk(node, tokens)
                if child is None:
                    reason = self._why(node, tokens, first, why)
                    break
            child.used = self._clock
            found.append(child)
            node = child
        if self.disk is not None and found:
            self.disk.touch([node.key.hex() for node in found])
        return found, reason

    def _from_disk(self, parent: Node, tokens: bytes) -> tuple[Node | None, str]:
        if self.disk is None:
            return None, ""
        key = hashlib.sha256(parent.key + tokens).digest()
        entry = self.disk.get(key.hex())
        if entry.tensors is None:
            return None, "" if entry.reason == "not on disk" else entry.reason
        try:
            if not self.memory.pages.free:
                self.evict(1, keep=parent)
            (page,) = self.memory.take_pages(1, parent.page)
        except CapacityError:
            return None, "no memory is free to read more of it from disk"
        try:
            put_page(self.memory, page, entry.tensors)
        except ValueError as error:
            self.memory.pages.drop([page])
            return None, f"its file is of another kind ({error})"
        return self._add(parent, key, tokens, page), ""

    def _why(self, node: Node, tokens: bytes, first: int, why: str) -> str:
        if why:
            return why
        if hashlib.sha256(node.key + tokens).digest() in self._evicted:
            return f"what followed token {first} was evicted"
        if not node.children:
            return "nothing is cached for this model" if node is self._root else f"new from token {first} on"
        wanted = np.frombuffer(tokens, np.int32)
        common = [
            int(np.argmax(np.append(wanted != np.frombuffer(child, np.int32), True))) for child in node.children
        ]
        return f"token {first + max(common)} is the first that differs from what is cached"

    # keep

    def insert(self, cache: SequenceCache, tokens: Sequence[int], count: int, node: Node | None = None) -> Node:
        """Keep the complete pages of a sequence.

        Args:
            cache: the sequence.
            tokens: what it has read, of which the first `count` are certain.
            node: where an earlier insertion of the same sequence ended; from the beginning if None or dropped.
        Returns:
            the node of the last complete page.
        """
        size = self.memory.page_tokens
        if node is None or node.dropped:
            node = self._root
        self._clock += 1
        for i in range(node.depth, min(cache.position, count) // size):
            packed = _packed(tokens[i * size : (i + 1) * size])
            child = node.children.get(packed)
            if child is None:
                key = hashlib.sha256(node.key + packed).digest()
                self.memory.pages.hold([cache.pages[i]])
                child = self._add(node, key, packed, cache.pages[i])
                if self.disk is not None:
                    self.disk.put(key.hex(), page_at(self.memory, child.page))
            child.used = self._clock
            node = child
        return node

    def keep_rings(self, cache: SequenceCache, node: Node) -> None:
        """Keep the rings at a node's end, if the sequence has only just passed it; see `wants_rings`."""
        end = node.depth * self.memory.page_tokens
        if node.rings is not None or node.dropped or not end or cache.position - end > SLACK or cache.since:
            return
        node.rings = rings_at(cache, end)
        self._keep(node)
        if self.disk is not None:
            self.disk.put(_rings_key(node), node.rings)

    def _add(self, parent: Node, key: bytes, tokens: bytes, page: int) -> Node:
        node = Node(key, tokens, parent, page, used=self._clock, depth=parent.depth + 1)
        parent.children[tokens] = node
        self._count += 1
        return node

    def _keep(self, node: Node) -> None:
        self._rings.append(node)
        self._rings_bytes += _size(node)
        while self._rings_bytes > self._rings_budget:
            oldest = self._rings.popleft()
            if oldest.rings is not None:
                self._rings_bytes -= _size(oldest)
                oldest.rings = None

    # forget

    def evict(self, count: int, keep: Node | None = None) -> int:
        """Give back pages that no sequence uses, the ones used longest ago first; returns how many.

        Args:
            count: pages wanted.
            keep: a node whose past must stay.
        """
        kept = set()
        while keep is not None:
            kept.add(keep.key)
            keep = keep.parent
        given = 0
        while given < count:
            leaves = [
                node for node in self.nodes()
                if not node.children and node.key not in kept and self.memory.pages.holders[node.page] == 1
            ]  # fmt: skip
            if not leaves:
                break
            leaves.sort(key=lambda node: node.used)
            for leaf in leaves:
                # a leaf's parents become leaves and were used no later; go up while that is so
                node: Node | None = leaf
                while node is not None and node is not self._root and given < count:
                    if node.children or node.key in kept or self.memory.pages.holders[node.page] != 1:
                        break
                    parent = node.parent
                    self._drop(node)
                    given += 1
                    node = parent if parent is not None and parent.used <= leaf.used else None
                if given >= count:
                    break
        return given

    def _drop(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens]
        node.dropped = True
        self.memory.pages.drop([node.page])
        self._count -= 1
        if node.rings is not None:
            self._rings_bytes -= _size(node)
            node.rings = None
        self._evicted[node.key] = None
        while len(self._evicted) > REMEMBERED:
            del self._evicted[next(iter(self._evicted))]

    @property
    def evictable(self) -> int:
        """Pages that `evict` could give back."""
        return sum(1 for node in self.nodes() if self.memory.pages.holders[node.page] == 1)

    def clear(self) -> None:
        """Give every page back that no sequence uses, and forget the rest; files stay."""
        for node in list(self.nodes()):
            node.dropped = True
            self.memory.pages.drop([node.page])
        self._root.children.clear()
        self._rings.clear()
        self._rings_bytes = self._count = 0


def _rings_key(node: Node) -> str:
    return hashlib.sha256(node.key + b"rings").hexdigest()


def _size(node: Node) -> int:
    assert node.rings is not None
    return sum(t.numel() * t.element_size() for t in node.rings)
