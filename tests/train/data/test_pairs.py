"""Pairs of ids: every answer follows from the text before it, and from nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.base.errors import ConfigError
from abyssal.train.data.pairs import FEW, SHARE, Pairs


@pytest.mark.parametrize("roles", ["fixed", "drawn"])
@pytest.mark.parametrize("ids", [(2, 128), (300, 4096), (0, 21)])
def test_an_answer_is_what_stood_behind_the_key_before(roles: str, ids: tuple[int, int]) -> None:
    pairs = Pairs(ids, roles, (20, 300))  # type: ignore[arg-type]
    lengths = set()
    for number in range(60):
        sequence, answers = pairs.generate(np.random.default_rng((5, number)))
        again, _ = pairs.generate(np.random.default_rng((5, number)))
        assert sequence.tolist() == again.tolist()
        assert ids[0] <= sequence.min() and sequence.max() < ids[1]
        assert answers.sum() == len(sequence) // SHARE
        lengths.add(len(sequence))
        for place in np.flatnonzero(answers):
            key = sequence[place - 1]
            first = sequence.tolist().index(key)
            assert first < place - 1 and not answers[place - 1]
            assert sequence[first + 1] == sequence[place]
    assert min(lengths) < 40 and max(lengths) > 200


def test_fixed_roles_never_mix_and_low_ids_are_common() -> None:
    pairs = Pairs((100, 1124), "fixed", (48, 256))
    keys: list[int] = []
    for number in range(300):
        sequence, answers = pairs.generate(np.random.default_rng(number))
        places = np.flatnonzero(answers)
        keys += sequence[places - 1].tolist()
        assert (sequence[places - 1] < 100 + 512).all()
        assert ((sequence[places] >= 100 + 512) & (sequence[places] < 100 + 768)).all()
    common = np.mean(np.array(keys) < 100 + FEW)
    assert common > 5 * FEW / 512  # more than its share by far
    assert max(keys) > 100 + 400  # and the others occur


def test_what_does_not_fit_is_named() -> None:
    pairs, rng = Pairs((2, 128)), np.random.default_rng(0)
    sequence, answers = pairs.sequence(rng, 200, 5, 95)  # no filler at all
    assert len(sequence) == 200 and answers.sum() == 95
    for length, count, asked in [(200, 5, 96), (200, 0, 5), (200, 5, 0), (400, pairs.most + 1, 5)]:
        with pytest.raises(ConfigError, match=f"{count} pairs and {asked} questions do not fit into {length}"):
            pairs.sequence(rng, length, count, asked)
    for lengths in [(10, 20), (60, 50)]:
        with pytest.raises(ConfigError, match=f"{lengths[0]} to {lengths[1]}"):
            Pairs((2, 128), "fixed", lengths)
    with pytest.raises(ConfigError, match="20 ids or more, not 2 to 12"):
        Pairs((2, 12))
