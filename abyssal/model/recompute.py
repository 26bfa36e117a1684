"""Blocks that keep nothing for the way back but what enters them, and run again there (training.md 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abyssal.kvcache.memory import LayerMemory
from abyssal.model.batch import Batch

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


@contextmanager
def _again(batch: Batch) -> Iterator[None]:
    recorder = batch.recorder
    assert recorder is not None
    batch.recorder = recorder.again()
    try:
        yield
    finally:
        batch.recorder = recorder


def through(block: Callable[..., T], streams_TND: Tensor, batch: Batch, memory: LayerMemory) -> T:
    """`block(streams_TND, memory=memory)`; it runs again on the way back where its recorder asks for that.

    Bits and gradients are equal either way. A block that runs twice must find its memory as it was. Each run gets an
    empty one, which is gone afterwards; so sequences have to begin with this pass, and `memory` stays as it is.

    Args:
        block: a block with all else that it takes.
        streams_TND: what enters it.
        batch: of the pass; its recorder hears of each layer once.
        memory: of the layer.
    Raises:
        ValueError: recomputation is asked for, and a sequence began in an earlier pass.
    """
    if batch.recorder is None or not batch.recorder.recompute or not torch.is_grad_enabled():
        return block(streams_TND, memory=memory)
    if any(span.start for span in batch.spans):
        raise ValueError("blocks run again only in passes from the start of every sequence: set recompute to False")
    return checkpoint(
        lambda x: block(x, memory=batch.memory.empty_layer(memory.ratio)),
        streams_TND,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn
        context_fn=lambda: (nullcontext(), _again(batch)),
    )
