"""Growing and sliding storage of encoded vectors.

While gradients are recorded, a store joins tensors; otherwise it writes into a buffer that doubles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abyssal.kvcache.codec import Codec


class GrowingStore:
    """Vectors that are only ever appended: compressed entries and index keys."""

    def __init__(self, codec: Codec, batch: int, device: torch.device | None = None):
        self.codec = codec
        self.length = 0
        self._buffer = torch.empty(batch, 0, codec.width, dtype=codec.stored_dtype, device=device)

    def append(self, x_BNC: Tensor) -> None:
        """Encode and add N vectors to each sequence."""
        new = self.codec.encode(x_BNC)
        end = self.length + new.shape[1]
        if new.requires_grad or self._buffer.requires_grad:
            self._buffer = torch.cat([self._buffer[:, : self.length], new], dim=1)
        else:
            if end > self._buffer.shape[1]:
                # double for the steps of decoding, take what is needed for a long prompt
                grown = new.new_empty(new.shape[0], max(end, 2 * self.length, 16), new.shape[2])
                grown[:, : self.length] = self._buffer[:, : self.length]
                self._buffer = grown
            self._buffer[:, self.length : end] = new
        self.length = end

    def read(self, stop: int | None = None) -> Tensor:
        """The first `stop` vectors (all by default), decoded, [B, T, C]."""
        return self.codec.decode(self._buffer[:, : self.length if stop is None else stop])

    def gather(self, indices_BQK: Tensor) -> Tensor:
        """The vectors with these numbers, decoded, [B, Q, K, C]; only they are decoded."""
        batch = indices_BQK.shape[0]
        if batch == 1:
            picked = self._buffer[0].index_select(0, indices_BQK.flatten())
        else:
            rows = torch.arange(batch, device=indices_BQK.device).view(-1, 1, 1) * self._buffer.shape[1]
            picked = self._buffer.flatten(0, 1).index_select(0, (indices_BQK + rows).flatten())
        return self.codec.decode(picked.view(*indices_BQK.shape, -1))

    def truncate(self, length: int) -> None:
        """Forget everything from vector number `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a store of {self.length} vectors to {length}: give 0..{self.length}")
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors held, without the spare room of the buffer."""
        row = self.codec.width * self._buffer.element_size()
        return self._buffer.shape[0] * self.length * row


class SlidingStore:
    """The last vectors of each sequence: window entries.

    A query reads `window` entries, its own among them, so `window - 1` stay between calls.
    """

    def __init__(self, codec: Codec, batch: int, window: int, device: torch.device | None = None):
        self.codec = codec
        self.window = window
        self._start = self._stop = 0
        room = 2 * window
        self._buffer = torch.zeros(batch, room, codec.width, dtype=codec.stored_dtype, device=device)

    @property
    def kept(self) -> int:
        """How many earlier vectors the next call will see."""
        return self._stop - self._start

    def extend(self, x_BSC: Tensor) -> Tensor:
        """Add S vectors; return the kept ones followed by the new ones, decoded, [B, kept + S, C]."""
        new = self.codec.encode(x_BSC)
        count = new.shape[1]
        if count == 1 and not new.requires_grad and not self._buffer.requires_grad:
            if self._stop == self._buffer.shape[1]:
                self._buffer[:, : self.kept] = self._buffer[:, self._start : self._stop].clone()
                self._start, self._stop = 0, self.kept
            self._buffer[:, self._stop : self._stop + 1] = new
            seen = self._buffer[:, self._start : self._stop + 1]
            self._stop += 1
        else:
            seen = torch.cat([self._buffer[:, self._start : self._stop], new], dim=1)
            self._restart(seen[:, max(seen.shape[1] - self.window + 1, 0) :])
            return self.codec.decode(seen)
        self._start = max(self._start, self._stop - self.window + 1)
        return self.codec.decode(seen)

    def _restart(self, kept: Tensor) -> None:
        buffer = torch.zeros_like(self._buffer)
        buffer[:, : kept.shape[1]] = kept
        self._buffer, self._start, self._stop = buffer, 0, kept.shape[1]

    def copy_kept(self) -> Tensor:
        """The encoded vectors that the next call will see; see `restore`."""
        return self._buffer[:, self._start : self._stop].clone()

    def restore(self, kept: Tensor) -> None:
        """Go back to a state that `copy_kept` returned."""
        self._restart(kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, which is fixed."""
        return self._buffer.numel() * self._buffer.element_size()
