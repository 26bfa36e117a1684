"""draw: a token by the Gumbel-max trick, with noise from a counter-based generator.

The noise of a token is the number that `numpy.random.Philox` gives for (seed, choice) and the token's place, so it is
defined without our code. Native: the same numbers and the C library's logarithms, but only of tokens that can win.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from abyssal.kernels.choice import native

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def noise(seed: int, choice: int, place: int, size: int) -> Floats:
    """Standard Gumbel noise of the first `size` tokens."""
    key = np.array([seed & (2**64 - 1), choice], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, place, 0])).gumbel(size=size)


def draw_reference(logits_V: Floats, ids: Ids | None, seed: int, choice: int, place: int) -> int:
    """The plain meaning."""
    scores = logits_V + noise(seed, choice, place, len(logits_V))
    return int(scores.argmax() if ids is None else ids[scores[ids].argmax()])


def draw(logits_V: Floats, ids: Ids | None, seed: int, choice: int, place: int) -> int:
    """The token whose logit and noise are the largest together; of equal ones the first.

    Args:
        logits_V: float64, divided by the temperature; minus infinity for what is not allowed.
        ids: tokens that take part, in rising order, at least one; None for all.
        seed, choice: what the noise belongs to.
        place: of the token in its answer.
    """
    if (fast := native()) is not None:
        token: int = fast.draw(np.ascontiguousarray(logits_V), ids, seed & (2**64 - 1), choice, place)
        if token >= 0:
            return token
    return draw_reference(logits_V, ids, seed, choice, place)
