"""Routed experts that are read from disk when they are chosen; those used last stay in memory.

One thread asks; a few others read, each a matrix at a time, and put what they read into the order of the native
kernels. So many matrices are on their way at once, which is what brings a disk to its rate, and an expert that is
there costs no more than one of a model in memory.
"""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.base.errors import CheckpointError
from abyssal.checkpoint.direct import PAGE, DirectFiles
from abyssal.checkpoint.release import Release
from abyssal.checkpoint.shards import TORCH_DTYPES, StoredTensor
from abyssal.kernels.choice import native
from abyssal.kernels.packed import GROUP, STRIP, Packed, format_of
from abyssal.model.moe import ORDER

READERS = 8  # matrices that are read at once
FIRST = "layers.0.ffn.experts.0."

Key = tuple[str, int]  # the prefix of a layer's experts, and a number


@dataclass
class ExpertUse:
    """What the routed experts cost so far; an expert counts once for each layer and pass that chose it.

    Attributes:
        hits, misses: those that were in memory, and those that were read.
        bytes_read: weights and scales of the latter.
        waited_s: seconds in which nothing could be computed before a read ended.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    waited_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of hits; 0 before the first use."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass
class _Entry:
    slot: int
    left: int = len(ORDER)  # matrices that are still to come
    wanted: bool = True  # asked for, and not yet used
    error: Exception | None = None


def expert_bytes(release: Release) -> int:
    """Bytes of a routed expert in the cache."""
    total = 0
    for weight, scale in _kind(release).values():
        fp4 = weight.dtype in ("I8", "U8")
        outputs, inputs = weight.shape[0], weight.shape[1] * (2 if fp4 else 1)
        padded = -(-outputs // STRIP) * STRIP * -(-inputs // GROUP) * GROUP
        total += weight.nbytes * padded // (outputs * inputs)
        if scale is not None:  # FP8's are kept as float32 too
            total += max(padded // GROUP, scale.nbytes) if fp4 else 5 * scale.nbytes
    return total


def staging_bytes(release: Release) -> int:
    """Bytes of the readers' buffers."""
    return READERS * max(w.nbytes + (s.nbytes if s else 0) + 4 * PAGE for w, s in _kind(release).values())


def _kind(release: Release) -> dict[str, tuple[StoredTensor, StoredTensor | None]]:
    """The matrices of the first expert, which the others resemble."""
    found = {}
    for part in ORDER:
        spec = release.specs[f"{FIRST}{part}.weight"]
        found[part] = release.shards.info(spec.name), release.shards.info(spec.scale) if spec.scale else None
    return found


def _check_alike(release: Release) -> None:
    """Every expert must fit into every slot.

    Raises:
        CheckpointError: one is stored in another type.
    """
    kinds: dict[str, str] = {}
    for name in release.specs:
        if ".ffn.experts." in name:
            part, dtype = name.split(".", 5)[-1], release.shards.info(name).dtype
            if kinds.setdefault(part, dtype) != dtype:
                raise CheckpointError(
                    f"{name} has dtype {dtype}, other experts {kinds[part]}: experts from disk must be alike,"
                    " use `abyssal convert` first"
                )


class ExpertCache:
    """Room for some routed experts of a release. One thread may use it.

    Args:
        slots: experts that it holds.
        dtype: of the activations that will meet them.

    Attributes:
        packed: w1, w3 and w2 of all slots, or empty where native kernels do not run or cannot read them.
        stored: then these, as stored, with their scales.
        use: what it cost so far.
    """

    def __init__(self, release: Release, slots: int, dtype: torch.dtype = torch.float32):
        _check_alike(release)
        self.slots = slots
        self.use = ExpertUse()
        self.packed: dict[str, Packed] = {}
        self.stored: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._release = release
        self._dtype = dtype
        self._kind = _kind(release)
        fast = native() is not None and dtype in (torch.float32, torch.bfloat16)
        for part, infos in self._kind.items():
            weight, scale = (None if i is None else torch.empty(i.shape, dtype=TORCH_DTYPES[i.dtype]) for i in infos)
            assert weight is not None
            weight = weight.bfloat16() if self._narrowed(part) else weight
            if fast and format_of(weight, scale) is not None:
                self.packed[part] = Packed.empty(slots, weight, scale)
            else:
                self.stored[part] = (
                    weight.new_empty(slots, *weight.shape),
                    None if scale is None else scale.new_empty(slots, *scale.shape),
                )
        self._files = DirectFiles()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="experts")
        self._read: queue.SimpleQueue[tuple[_Entry, Exception | None]] = queue.SimpleQueue()
        self._reading = 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # by last use
        self._free = list(range(slots))

    def expect(self, keys: Iterable[Key]) -> None:
        """Begin to read those of these experts that are not there, as far as there is room beside what is wanted."""
        self._settle()
        absent = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.error is not None and not entry.left:
                self._drop(key)
                entry = None
            if entry is None:
                absent.append(key)
                continue
            if not entry.wanted:
                entry.wanted = True
                self.use.hits += 1
            self._entries.move_to_end(key)
        for key in absent:
            if not self._free and not self._evict(wanted=False):
                return
            self._begin(key)

    def arrived(self, keys: Collection[Key]) -> dict[Key, int]:
        """Slots of those of these experts that are there; waits until at least one is. They stay until `done`.

        Raises:
            CheckpointError: one of them could not be read.
        """
        while True:
            self._settle()
            there = {}
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and not entry.left:
                    if entry.error is not None:
                        self._forget_failures()
                        raise entry.error
                    there[key] = entry.slot
            if there:
                self.expect(there)
                return there
            self.expect(keys)
            coming = any(key in self._entries for key in keys)
            # what was expected and never used gives way at last
            if (coming or not self._evict(wanted=True)) and not any(self._is_there(key) for key in keys):
                self._wait()

    def done(self, keys: Iterable[Key]) -> None:
        """These experts were used, and may make room for others."""
        for key in keys:
            self._entries[key].wanted = False

    def _is_there(self, key: Key) -> bool:
        entry = self._entries.get(key)
        return entry is not None and not entry.left

    def _drop(self, key: Key) -> None:
        self._free.append(self._entries.pop(key).slot)

    def _forget_failures(self) -> None:
        """Let what is being read end: whoever asks after a failure gets a new reading, not an old error."""
        while self._reading:
            self._settle(wait=True)
        for key, entry in list(self._entries.items()):
            entry.wanted = False
            if entry.error is not None:
                self._drop(key)

    def _evict(self, wanted: bool) -> bool:
        """Drop what was used longest ago; whether there was something."""
        for key, entry in self._entries.items():
            if not entry.left and (wanted or not entry.wanted):
                self._drop(key)
                return True
        return False

    def _begin(self, key: Key) -> None:
        entry = self._entries[key] = _Entry(self._free.pop())
        self.use.misses += 1
        prefix, number = key
        for part in ORDER:
            name = f"{prefix}{number}.{part}.weight"
            scale = self._release.specs[name].scale
            tensors = [self._release.shards.info(n) for n in (name, scale) if n]
            self.use.bytes_read += sum(tensor.nbytes for tensor in tensors)
            self._reading += 1
            self._readers.submit(self._fetch, entry, part, tensors)

    def _fetch(self, entry: _Entry, part: str, tensors: list[StoredTensor]) -> None:
        """Read one matrix into its slot; in a reader's thread."""
        error = None
        try:
            with torch.inference_mode():
                weight, *scales = self._files.read(tensors)
                self._put(part, entry.slot, weight, scales[0] if scales else None)
        except Exception as problem:  # told to whoever waits for it
            error = problem
        self._read.put((entry, error))

    def _narrowed(self, part: str) -> bool:
        """Whether float32 weights meet bfloat16 activations, which take them as bfloat16."""
        return self._dtype == torch.bfloat16 and self._kind[part][0].dtype == "F32"

    def _put(self, part: str, slot: int, weight: Tensor, scale: Tensor | None) -> None:
        if self._narrowed(part):
            weight = weight.clone().view(torch.float32).bfloat16().view(torch.uint8)
        if part in self.packed:
            packed = self.packed[part]
            if scale is not None and packed.format == "float8":
                info = self._kind[part][1]
                assert info is not None
                scale = scale.clone().view(TORCH_DTYPES[info.dtype]).view(info.shape)  # a copy is aligned
            packed.put(slot, weight, scale)
            return
        for room, data in zip(self.stored[part], (weight, scale), strict=True):
            if room is not None and data is not None:
                room[slot].view(torch.uint8).view(-1).copy_(data)

    def _settle(self, wait: bool = False) -> None:
        """Note what the readers have done; `wait` for one of them."""
        while self._reading:
            try:
                entry, error = self._read.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._reading -= 1
            entry.left -= 1
            entry.error = entry.error or error

    def _wait(self) -> None:
        begin = time.perf_counter()
        self._settle(wait=True)
        self.use.waited_s += time.perf_counter() - begin
