"""What the tests of native kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from abyssal.kernels.choice import choice, forced, native

ISAS = choice().supported
needs_native = pytest.mark.skipif(not ISAS, reason="the extension was not built")
UNIT = 2.0**-24  # rounding error of float32


def gamma(n: float) -> float:
    """Relative error of a value that was rounded n times (Higham, Accuracy and Stability, 3.1)."""
    return n * UNIT / (1 - n * UNIT)


def on_every_isa(run: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Results of each instruction set, which must agree to the bit, on one thread and on several.

    The body of the loop runs on that instruction set too.
    """
    first = None
    for isa in ISAS:
        with forced(isa), torch.inference_mode():
            module = native()
            assert module is not None
            threads = module.threads()
            try:
                for count in (1, 3):
                    module.set_threads(count)
                    found = run()
                    first = first or found
                    for a, b in zip(first, found, strict=True):
                        assert same_bits(a, b), isa
            finally:
                module.set_threads(threads)
            yield found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal float32 numbers, signs of zeros too, and NaN at the same places."""
    nan = a.isnan()
    kind = {torch.float32: torch.int32}.get(a.dtype, a.dtype)
    a, b = a.contiguous().masked_fill(nan, 0), b.contiguous()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(kind), b.masked_fill(nan, 0).view(kind))
