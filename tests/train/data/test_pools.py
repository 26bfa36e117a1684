"""The cut between training and evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from abyssal.train.data.pools import SPLITS, WIDE, WORDS, draw, entries, pick_some, pool, seeded, split_of, wide_pool

LISTS = sorted(path.stem for path in WORDS.glob("*.txt") if path.stem != "common")


@pytest.mark.parametrize("name", LISTS)
def test_the_parts_share_nothing_and_leave_nothing(name: str) -> None:
    train, held_out = (set(pool(name, split)) for split in SPLITS)
    assert not train & held_out
    assert train | held_out == set(entries(name))
    assert len(entries(name)) == len(set(entries(name))), "an entry stands twice"
    assert min(len(train), len(held_out)) >= 5
    assert all(entry.isascii() and entry == " ".join(entry.split()) for entry in entries(name))


@pytest.mark.parametrize("name", LISTS)
def test_wide_pools_widen_training_alone(name: str) -> None:
    """No common word is one that is held out, not even as a part of an entry."""
    assert wide_pool(name, "held_out") == pool(name, "held_out")
    wide = wide_pool(name, "train")
    assert len(wide) == len(set(wide))
    common = set(entries("common")) - set(entries(name)) if name in WIDE else set()
    assert set(wide) - set(pool(name, "train")) == common
    held_out = {word for entry in pool(name, "held_out") for word in entry.lower().split()}
    assert not held_out & set(entries("common"))


def test_the_cut_is_seven_to_three() -> None:
    share = np.mean([split_of(f"w{i}") == "train" for i in range(4000)])
    assert 0.67 < share < 0.73  # four standard deviations


def test_seeds_repeat_and_differ() -> None:
    drawn = {
        (domain, split, index, seed): int(seeded(domain, split, index, seed).integers(1 << 62))
        for domain in ("a", "b")
        for split in SPLITS
        for index in range(5)
        for seed in (0, 1)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert drawn["a", "train", 3, 1] == int(seeded("a", "train", 3, 1).integers(1 << 62))


@pytest.mark.parametrize("split", SPLITS)
def test_draw_stays_in_its_part(split: str) -> None:
    rng = np.random.default_rng(0)
    made = [draw(split, lambda: str(rng.integers(1000))) for _ in range(100)]  # type: ignore[arg-type]
    assert {split_of(m) for m in made} == {split}


def test_some_are_different_ones() -> None:
    rng = np.random.default_rng(0)
    assert all(len(set(pick_some(rng, range(5), 4))) == 4 for _ in range(50))
