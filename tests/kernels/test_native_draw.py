"""Native sampling against NumPy's own Gumbel noise: the same token, always."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.kernels.choice import forced, native
from abyssal.kernels.draw import Ids, draw, draw_reference, noise
from tests.kernels.native import ISAS, needs_native

pytestmark = needs_native


def test_noise_depends_on_seed_choice_and_place_alone() -> None:
    assert noise(3, 1, 9, 50).tolist() == noise(3, 1, 9, 50).tolist() == noise(3, 1, 9, 80)[:50].tolist()
    others = [noise(*key, 50) for key in ((3, 1, 9), (4, 1, 9), (3, 2, 9), (3, 1, 10), (-3, 1, 9), (3 + 2**32, 1, 9))]
    assert len({tuple(values) for values in others}) == 6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 600, 4097, 40000])
@pytest.mark.parametrize("kind", ["flat", "broad", "peaked", "tied", "masked", "huge", "near"])
def test_the_token_is_that_of_the_definition(kind: str, size: int, isa: str) -> None:
    rng = np.random.default_rng(size)
    logits = rng.normal(size=size) * {"flat": 0, "peaked": 30, "huge": 1e300}.get(kind, 3)
    if kind == "tied":
        logits = np.round(logits)
    if kind == "masked":
        logits[rng.random(size) < 0.9] = -np.inf
    some: Ids = np.flatnonzero(rng.random(size) < 0.3)
    for place in range(12):
        seed = int(rng.integers(-(2**63), 2**63 - 1))
        if kind == "near":  # all tokens score the same but for the last digits of float64
            logits = -noise(seed, 2, place, size)
        with forced(isa):
            module = native()
            assert module is not None
            threads = module.threads()
            for count in (1, 3):
                module.set_threads(count)
                for ids in (None, some):
                    if ids is None or len(ids):
                        found = draw(logits, ids, seed, 2, place)
                        assert found == draw_reference(logits, ids, seed, 2, place)
            module.set_threads(threads)


def test_what_numpy_has_to_decide_is_left_to_it() -> None:
    module = native()
    assert module is not None
    nothing = np.full(8, -np.inf)
    assert module.draw(nothing, None, 1, 0, 0) == -1
    assert draw(nothing, None, 1, 0, 0) == draw_reference(nothing, None, 1, 0, 0)
    assert module.draw(np.array([0.0, np.inf]), None, 1, 0, 0) == -1
    for bad in ([1, 0], [0, 8], [-1, 3], [2, 2]):
        with pytest.raises(ValueError, match="ids"):
            module.draw(np.zeros(8), np.array(bad), 1, 0, 0)
