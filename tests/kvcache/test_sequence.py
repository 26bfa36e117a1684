"""Forks, rewinds, files: every way back gives the bits of a run that never left the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.base.errors import CapacityError, InputError, SaveError
from abyssal.kvcache import SequenceCache
from abyssal.kvcache.image import from_bytes, load, put_page, put_rings, rings_at, save, to_bytes
from abyssal.kvcache.memory import SLACK
from abyssal.model import Transformer
from abyssal.quant.numerics import MODES, Mode, Numerics
from tests.cases import random_config, random_ids, random_model
from tests.faults import largest_file


def model_of(seed: int, mode: Mode = "exact") -> Transformer:
    return random_model(random_config(seed), seed, torch.float32, Numerics.of(mode))


def read(model: Transformer, cache: SequenceCache, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model.run(torch.tensor(ids), [cache]).z_TD)


def whole(model: Transformer, ids: list[int]) -> torch.Tensor:
    return read(model, model.new_cache(), ids)


@pytest.mark.parametrize("seed", range(8))
@settings(deadline=None, max_examples=8)
@given(st.lists(st.tuples(st.integers(1, 140), st.integers(0, SLACK)), min_size=1, max_size=8), st.integers(0, 99))
def test_rewinding_forgets_exactly_what_came_after(seed: int, moves: list[tuple[int, int]], salt: int) -> None:
    """Ring, unfinished blocks and entry counts come back (trap 28: only the window was saved)."""
    model = model_of(seed)
    cache, ids = model.new_cache(), []
    for step, (forward, back) in enumerate(moves):
        ids += random_ids(model.config, forward, salt + step)
        read(model, cache, ids[cache.position :])
        back = min(back, len(ids))
        ids = ids[: len(ids) - back]
        if len(ids) >= cache._highest - SLACK:
            cache.rewind(len(ids))
        else:
            ids += random_ids(model.config, cache.position - len(ids), 0)
            cache, _ = model.new_cache(), None
            read(model, cache, ids)
    last = random_ids(model.config, 5, salt)
    assert torch.equal(read(model, cache, last), whole(model, ids + last)[len(ids) :])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [0, 2, 5])
def test_forks_go_their_own_ways(seed: int, mode: Mode) -> None:
    model = model_of(seed, mode)
    ids = random_ids(model.config, 333)
    cache = model.new_cache()
    read(model, cache, ids[:300])
    memory = cache.memory
    pages = memory.pages.count - memory.pages.free
    forks = [cache.fork() for _ in range(3)]
    assert memory.pages.count - memory.pages.free == pages, "a fork costs nothing until it writes"
    tails = [random_ids(model.config, 40, n) for n in range(4)]
    for fork, tail in zip([cache, *forks], tails, strict=True):
        got = read(model, fork, tail)
        assert torch.equal(got, whole(model, ids[:300] + tail)[300:])
    # only the page that 300 tokens left open was copied
    assert memory.pages.count - memory.pages.free == pages + 3
    for fork in (cache, *forks):
        fork.release()
    assert memory.pages.free == memory.pages.count and memory.slots.free == memory.slots.count


def test_a_fork_is_a_way_back_of_any_length() -> None:
    model = model_of(4)
    ids = random_ids(model.config, 280)
    cache = model.new_cache()
    read(model, cache, ids[:133])
    kept = cache.fork()
    for token in random_ids(model.config, 130, 7):
        read(model, cache, [token])
    with pytest.raises(ValueError, match=f"cannot rewind from token 263 to 133: the rings hold {SLACK}"):
        cache.rewind(133)
    with pytest.raises(ValueError, match="cannot rewind"):
        kept.rewind(134)
    assert torch.equal(read(model, kept, ids[133:]), whole(model, ids)[133:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("seed", "length"), [(0, 1), (0, 133), (4, 256), (6, 300), (3, 20)])
def test_a_saved_sequence_goes_on_in_another_memory(seed: int, length: int, mode: Mode, tmp_path: Path) -> None:
    model = model_of(seed, mode)
    ids = random_ids(model.config, length + 20)
    cache = model.new_cache()
    read(model, cache, ids[:length])
    save(cache, tmp_path / "state")
    memory = model.new_memory()
    memory.take_pages(3)  # so that pages have other numbers
    again = load(memory, tmp_path / "state")
    assert again.position == length
    assert torch.equal(read(model, again, ids[length:]), whole(model, ids)[length:])


def test_bad_files_are_refused_and_nothing_is_held(tmp_path: Path) -> None:
    model, other = model_of(0), model_of(5)
    cache = model.new_cache()
    read(model, cache, random_ids(model.config, 200))
    path = tmp_path / "state"
    save(cache, path)
    data = path.read_bytes()
    memory = model.new_memory(pages=1, slots=1)
    with pytest.raises(CapacityError):
        load(memory, path)
    assert memory.pages.free == 1 and memory.slots.free == 1
    with pytest.raises(InputError, match="another model"):
        load(other.new_memory(), path)
    with pytest.raises(InputError, match="another model"):
        load(random_model(model.config, 0, torch.float32, Numerics.of("packed")).new_memory(), path)
    for damage in (b"", data[:-1], data[:100], data[:500] + bytes([data[500] ^ 1]) + data[501:]):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="no saved sequence"):
            load(model.new_memory(), path)
    with pytest.raises(InputError, match="cannot be read"):
        load(model.new_memory(), tmp_path / "nothing")
    path.write_bytes(data)
    with largest_file(1000), pytest.raises(SaveError):
        save(cache, path)
    assert path.read_bytes() == data


def test_copies_of_another_model_do_not_fit() -> None:
    model, other = model_of(0), model_of(5)
    cache = model.new_cache()
    read(model, cache, random_ids(model.config, 128))
    target = other.new_cache()
    with pytest.raises(ValueError, match="not those of token 0"):
        put_rings(target, rings_at(cache, 128))
    page = target.memory.take_pages(1)[0]
    with pytest.raises(ValueError, match="another model"):
        put_page(target.memory, page, [torch.zeros(3, 4)])


def test_bytes_come_back_with_their_facts() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.zeros(0, 4)]
    got, facts = from_bytes(to_bytes(tensors, {"key": "value"}))
    assert facts["key"] == "value"
    assert all(torch.equal(a, b) for a, b in zip(got, tensors, strict=True))


def test_a_prefix_is_attached_to_a_new_sequence_alone() -> None:
    model = model_of(0)
    cache = model.new_cache()
    read(model, cache, random_ids(model.config, 256))
    with pytest.raises(ValueError, match="attach a prefix to a new one"):
        cache.attach(cache.pages, 128)
    fresh = SequenceCache(cache.memory)
    with pytest.raises(ValueError, match="1 pages do not hold 256 tokens"):
        fresh.attach(cache.pages[:1], 256)
