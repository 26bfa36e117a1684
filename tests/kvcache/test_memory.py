"""Pages and slots: who holds what, where runs lie, what a bounded memory refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.arch.presets import preset
from abyssal.base.errors import CapacityError
from abyssal.efficiency.kv import kv_cost
from abyssal.kvcache.memory import Counted, Memory
from abyssal.quant.numerics import Numerics


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_free_and_held_places_are_all_places(count: int, seed: int) -> None:
    rng = random.Random(seed)
    counted = Counted("pages", count, bounded=True)
    held: list[int] = []
    for _ in range(60):
        what = rng.randrange(3)
        if what == 0:
            wanted = rng.randint(1, 5)
            if wanted > counted.free:
                with pytest.raises(CapacityError, match=f"{wanted} pages are needed, {counted.free} of {count}"):
                    counted.take(wanted)
            else:
                held += counted.take(wanted, rng.choice([-1, *held]))
        elif what == 1 and held:
            place = rng.choice(held)
            counted.hold([place])
            held.append(place)
        elif held:
            place = held.pop(rng.randrange(len(held)))
            counted.drop([place])
        assert counted.holders.tolist() == np.bincount(held, minlength=count).tolist()
        assert counted.free == count - len(set(held))


def test_a_long_prompt_gets_a_run_and_grows_behind_itself() -> None:
    counted = Counted("pages", 100, bounded=True)
    first = counted.take(10)
    assert first == list(range(first[0], first[0] + 10))
    second = counted.take(10)
    assert second == list(range(second[0], second[0] + 10)) and second[0] > first[-1] + 10
    assert counted.take(1, first[-1]) == [first[-1] + 1]


def test_a_memory_without_limits_grows_and_keeps_what_it_has() -> None:
    memory = Memory(preset("nano"))
    (page,) = memory.take_pages(1)
    entries = next(memory.compressors())
    entries.entries[entries.page_rows(page)] = 5.0
    memory.take_pages(30)
    assert (entries.entries[entries.page_rows(page)] == 5.0).all()
    assert not entries.entries[0].any(), "row 0 stands for no entry"


@pytest.mark.parametrize("name", ["flash", "pro", "nano"])
def test_a_page_has_the_bytes_of_the_calculation(name: str) -> None:
    """What the memory allocates for 128 tokens, against section 4.1's arithmetic."""
    config = preset(name)
    memory = Memory(config, Numerics.of("packed"), pages=0, slots=0)
    assert memory.page_bytes == kv_cost(config).at(128)
    assert Memory(config, Numerics.of("packed"), pages=0, slots=0, page_tokens=512).page_bytes == 4 * memory.page_bytes


def test_a_page_is_a_multiple_of_the_longest_block() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        Memory(preset("nano"), page_tokens=100)
