"""The only caller of the model: tokens of many sequences in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.kernels.choice import native
from abyssal.kvcache.sequence import SequenceCache
from abyssal.model import Batch, Output, Transformer
from abyssal.model.moe import Experts

SMALL_PASS = 32  # tokens up to which threads cost more than they bring, in a small model
SMALL_MODEL = 1 << 26  # parameters
SHORT = 1 << 15  # tokens of all contexts together, up to which the index keys are soon read


class Runner:
    """Runs a model without gradients.

    A pass of few tokens through a small model runs on one thread: waking the others takes longer than the
    work. Those that read experts from disk would hold up torch's other threads, while native kernels, which have
    threads of their own, do the work. The bits do not depend on it (`kernels.linear`).
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._threads = torch.get_num_threads()
        from_disk = any(isinstance(module, Experts) and module.on_disk for module in model.modules())
        self._small = model.size < SMALL_MODEL or (from_disk and native() is not None)
        model.pack()

    @contextmanager
    def working(self, tokens: int, context: int = 0) -> Iterator[None]:
        """What calls of the model stand in, and all work on tensors around them.

        Even an index into a few rows wakes torch's threads, for milliseconds where others keep the cores busy.

        Args:
            tokens: of all passes inside.
            context: tokens of all their contexts.
        """
        small = self._small and tokens <= SMALL_PASS and context <= SHORT
        torch.set_num_threads(1 if small else self._threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(self._threads)

    def run(
        self, caches: Sequence[SequenceCache], tokens: Sequence[Sequence[int]], *, watch: bool = False
    ) -> Output:
        """One pass; the caches advance. Rows lie in the order of the sequences; `watch` as `Transformer.run`."""
        ids_T = torch.from_numpy(np.concatenate([np.asarray(ids, np.int64) for ids in tokens]))
        return self.model.run(ids_T, caches, [len(ids) for ids in tokens], watch=watch)

    def logits(self, z_TD: Tensor) -> NDArray[np.float64]:
        """Logits of some rows, [T, V]."""
        return self.model.logits(z_TD).double().numpy()

    def draft(
        self,
        streams_TND: Tensor,
        next_ids: Sequence[int],
        caches: Sequence[SequenceCache],
        lengths: Sequence[int],
        starts: Sequence[int],
        since: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """One step of the MTP block: z_TD and streams_TND; see `Transformer.draft`."""
        batch = Batch(caches, lengths, starts, since)
        return self.model.draft(streams_TND, torch.tensor(next_ids), batch)
