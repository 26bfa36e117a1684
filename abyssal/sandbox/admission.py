"""Room for sandboxes: what the host gives, in fair turns between jobs, and back-pressure beyond (sandbox.md 4, 9)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass

from abyssal.sandbox.api import Spec
from abyssal.sandbox.errors import QuotaExceeded, Rejected


@dataclass(frozen=True)
class Capacity:
    """What a host gives to sandboxes.

    Attributes:
        memory: bytes of all limits together.
        sandboxes: that live at once.
        starting: that start at once; more only make each other slow.
        waiting: requests that may wait; the next is rejected at once.
        patience: seconds after which a waiting request is rejected.
        per_job: sandboxes that one job may have; None for no such quota.
    """

    memory: int = 16 << 30
    sandboxes: int = 512
    starting: int = 4
    waiting: int = 1024
    patience: float = 60.0
    per_job: int | None = None


class Admission:
    """Counts what is taken and lets jobs in by turns: one that asks for a thousand does not hold up one that asks once.

    Args:
        capacity: of the host.
    """

    def __init__(self, capacity: Capacity):
        self.capacity = capacity
        self.memory = 0
        self.sandboxes = 0
        self.starting = 0
        self.rejected = 0
        self._jobs: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[tuple[Spec, asyncio.Future[None]]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def used(self) -> float:
        """How full the host is: what is short most, of what it gives; above 1 where requests wait."""
        room = self.capacity
        return max(self.memory / room.memory, (self.sandboxes + self.waiting) / room.sandboxes)

    def take(self, spec: Spec) -> None:
        """Count a sandbox that lives already."""
        self.memory += spec.limits.memory
        self.sandboxes += 1
        self._jobs[job(spec)] = self._jobs.get(job(spec), 0) + 1

    async def enter(self, spec: Spec) -> None:
        """Wait for room and a turn to start; `started` ends the turn, `leave` gives the room back.

        Raises:
            Rejected: it does not fit, too many wait, or it waited too long.
            QuotaExceeded: its job has all that it may have.
        """
        room, name = self.capacity, job(spec)
        if spec.limits.memory > room.memory:
            self.rejected += 1
            raise Rejected(f"a sandbox of {spec.limits.memory} bytes never fits: this host gives {room.memory}")
        queued = len(self._queues.get(name, ()))
        if room.per_job is not None and self._jobs.get(name, 0) + queued >= room.per_job:
            raise QuotaExceeded(f"job {name!r} has the {room.per_job} sandboxes that it may have: stop one of them")
        if not self._queues and self._fits(spec):
            self.take(spec)
            self.starting += 1
            return
        if self.waiting >= room.waiting:
            self.rejected += 1
            raise Rejected(f"no room, and {room.waiting} requests wait already: try again later or elsewhere")
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(name, deque()).append((spec, turn))
        try:
            await asyncio.wait_for(turn, room.patience)
        except TimeoutError:
            self.rejected += 1
            raise Rejected(f"no room within {room.patience:g} seconds: try again later or elsewhere") from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in, and gone at the same moment
                self.started()
                self.leave(spec)
            raise
        finally:
            self._forget(name, turn)

    def started(self) -> None:
        """A start is over, well or not."""
        self.starting -= 1
        self._let_in()

    def leave(self, spec: Spec) -> None:
        """A sandbox is gone."""
        self.memory -= spec.limits.memory
        self.sandboxes -= 1
        name = job(spec)
        self._jobs[name] -= 1
        if not self._jobs[name]:
            del self._jobs[name]
        self._let_in()

    def _fits(self, spec: Spec) -> bool:
        room = self.capacity
        return (
            self.starting < room.starting
            and self.sandboxes < room.sandboxes
            and self.memory + spec.limits.memory <= room.memory
        )

    def _let_in(self) -> None:
        """Whose turn it is, as long as there is room; a job that had its turn goes to the end."""
        passed = 0
        while self._queues and passed < len(self._queues):
            name, queue = next(iter(self._queues.items()))
            self._queues.move_to_end(name)
            while queue and queue[0][1].done():
                queue.popleft()
            if not queue:
                del self._queues[name]
                continue
            spec, turn = queue[0]
            if not self._fits(spec):
                passed += 1
                continue
            queue.popleft()
            if not queue:
                del self._queues[name]
            self.take(spec)
            self.starting += 1
            turn.set_result(None)
            passed = 0

    def _forget(self, name: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(name)
        if queue is None:
            return
        left = deque(entry for entry in queue if entry[1] is not turn)
        if left:
            self._queues[name] = left
        else:
            del self._queues[name]


def job(spec: Spec) -> str:
    """The job of a sandbox: its label, or none."""
    return spec.labels.get("job", "")
