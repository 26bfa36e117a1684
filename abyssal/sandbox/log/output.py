"""Output while it comes: beginning and end within a cap, the middle dropped, the total counted."""

from __future__ import annotations

from abyssal.sandbox.log.blobs import Kept

FLOOR = 8192  # bytes that a stream keeps even when its sandbox has used up its budget


class Budget:
    """Bytes that all streams of a sandbox may keep together."""

    def __init__(self, total: int):
        self.left = total

    def take(self, count: int) -> int:
        """Up to `count` bytes of what is left."""
        granted = min(count, self.left)
        self.left -= granted
        return granted


class Output:
    """One stream.

    Args:
        cap: bytes to keep.
        budget: shared with the sandbox's other streams.
    """

    def __init__(self, cap: int, budget: Budget):
        self._cap, self._budget = cap, budget
        self._head = bytearray()
        self._tail = bytearray()
        self._granted = 0
        self._gap = False
        self.total = 0

    @property
    def over(self) -> bool:
        """Whether the middle is being dropped."""
        return self._gap or self.total > self._cap

    def add(self, data: bytes) -> None:
        """Bytes that came."""
        self.total += len(data)
        wanted = min(self.total, self._cap) - self._granted
        if wanted > 0:
            granted = self._budget.take(wanted)
            self._granted += granted
            if granted < wanted:  # from here on as if this were the cap
                self._cap = max(self._granted, min(FLOOR, self._cap))
        room = 0 if self._gap else self._cap - self._cap // 2 - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._keep + 65536:
            self._trim()

    def lose(self, count: int) -> None:
        """Bytes that came and were not seen: the end that is kept is what follows them."""
        self.total += count
        self._gap = True
        self._tail.clear()

    @property
    def _keep(self) -> int:
        return max(self._cap - len(self._head), 0)

    def _trim(self) -> None:
        if len(self._head) + len(self._tail) > self._cap:
            del self._tail[: max(len(self._tail) - self._keep, 0)]

    def read(self, offset: int) -> tuple[int, bytes]:
        """Bytes from an offset on, or from the next one that is still there, and that offset."""
        begin = self.total - len(self._tail)
        if offset < len(self._head):
            return offset, bytes(self._head[offset:]) + (b"" if begin > len(self._head) else bytes(self._tail))
        offset = max(offset, begin)
        return offset, bytes(self._tail[offset - begin :])

    def kept(self) -> Kept:
        """What to store."""
        self._trim()
        return Kept(bytes(self._head + self._tail), self.total, len(self._head) if self.over else self.total)
