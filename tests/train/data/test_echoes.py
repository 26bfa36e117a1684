"""Stretches that come again: every learnt token follows from the ids before it, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.base.errors import ConfigError
from abyssal.train.data.echoes import LONGEST, SHORTEST, Echoes


@pytest.mark.parametrize(("ids", "lengths"), [((300, 4096), (48, 1024)), ((2, 130), (20, 128)), ((0, 20), (20, 20))])
def test_what_is_learnt_follows_from_the_last_time(ids: tuple[int, int], lengths: tuple[int, int]) -> None:
    echoes = Echoes(ids, lengths)
    shares, sizes, distances = [], [], []
    for number in range(80):
        sequence, follows = echoes.generate(np.random.default_rng((7, number)))
        again, _ = echoes.generate(np.random.default_rng((7, number)))
        assert sequence.tolist() == again.tolist()
        assert lengths[0] <= len(sequence) == len(follows) <= lengths[1]
        assert ids[0] <= sequence.min() and sequence.max() < ids[1]
        last: dict[int, int] = {}
        for place, (token, learnt) in enumerate(zip(sequence.tolist(), follows, strict=True)):
            if learnt:
                before = last[int(sequence[place - 1])]
                assert sequence[before + 1] == token
                distances.append(place - before)
            if place:
                last[int(sequence[place - 1])] = place - 1
        shares.append(follows.mean())
        sizes.append(len(sequence))
    assert np.mean(shares) > 0.35, "much of it is learnt from"
    assert max(distances) > lengths[1] / 3 and min(distances) <= LONGEST
    assert lengths[0] == lengths[1] or min(sizes) < lengths[1] / 2


def test_what_does_not_fit_is_named() -> None:
    for lengths in [(SHORTEST - 1, 40), (60, 50)]:
        with pytest.raises(ConfigError, match=f"{lengths[0]} to {lengths[1]}"):
            Echoes((2, 128), lengths)
    with pytest.raises(ConfigError, match="200 tokens need as many ids, not 2 to 128"):
        Echoes((2, 128), (48, 200))
