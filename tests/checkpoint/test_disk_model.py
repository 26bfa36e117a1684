"""A release with its experts on disk against the same release in memory: equal bits under tiny limits."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.arch.presets import preset
from abyssal.base.errors import CheckpointError, InputError
from abyssal.base.machine import resident_bytes
from abyssal.checkpoint.disk_model import DiskExperts, load_from_disk, plan_disk
from abyssal.checkpoint.expert_cache import ExpertCache
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.release import Release
from abyssal.checkpoint.save import make_release
from abyssal.engine.engine import Engine
from abyssal.engine.request import Event, Request
from abyssal.engine.sampler import Sampling
from abyssal.kernels.choice import NAMES, choice, forced
from abyssal.model import Transformer
from abyssal.model.moe import Experts
from abyssal.quant.numerics import Numerics

# plain C++ is the same source as the others, and slow
KERNELS = tuple(n for n in NAMES if n == "reference" or (n != "scalar" and n in choice().supported))
EXPERTS = 9
LAYERS = 3  # of which one is hash-routed


@pytest.fixture(scope="module", params=["flash", "base", "bf16", "fp32"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine experts of which three are chosen; odd sizes: strips and FP8's tiles have edges."""
    folder: Path = tmp_path_factory.mktemp("disk") / str(request.param)
    config = replace(
        preset("nano"), vocab_size=150, hidden_size=96, num_hidden_layers=LAYERS, compress_ratios=(0, 4, 128, 0),
        num_hash_layers=1, n_routed_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=160, index_topk=4,
    )  # fmt: skip
    make_release(config, 3, request.param, folder, shard_bytes=300_000)
    return folder


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 150, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["exact", "fake"])
@pytest.mark.parametrize("slots", [1, 2, 4, EXPERTS * LAYERS])
def test_logits_are_those_of_the_release_in_memory(release: Path, kernels: str, slots: int, mode: str) -> None:
    numerics = Numerics.of("fake" if mode == "fake" else "exact")
    whole = load_model(release, numerics=numerics, keep_stored=True).pack()
    model, cache = load_from_disk(Release(release), slots, numerics=numerics)
    with torch.inference_mode():
        for batch, length in ((1, 1), (1, 70), (3, 20)):
            ids = ids_of(batch, length)
            assert torch.equal(model(ids), whole(ids))
        caches, others = [model.new_cache() for _ in range(5)], [whole.new_cache() for _ in range(5)]
        for step in range(6):  # decoding a batch
            ids = ids_of(5, 1, seed=step)
            assert torch.equal(model(ids, caches), whole(ids, others))
    if slots == EXPERTS * LAYERS:  # each is read once, if it is chosen at all
        assert EXPERTS * LAYERS // 2 < cache.use.misses <= EXPERTS * LAYERS < cache.use.hits
    else:
        assert cache.use.misses > EXPERTS * LAYERS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_activations(release: Path, dtype: torch.dtype) -> None:
    whole = load_model(release, dtype=dtype, keep_stored=True).pack()
    model, _ = load_from_disk(Release(release), 4, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(model(ids_of(2, 30)), whole(ids_of(2, 30)))


def test_float32_weights_in_memory_give_the_same_bits(release: Path) -> None:
    whole = load_model(release).pack()
    model, _ = load_from_disk(Release(release), 5)
    with torch.inference_mode():
        assert torch.equal(model(ids_of(2, 30)), whole(ids_of(2, 30)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_threads_nor_other_tokens_change_a_bit(release: Path, threads: int) -> None:
    from abyssal.kernels.choice import extension

    model, _ = load_from_disk(Release(release), 3)
    ids = ids_of(4, 25)
    fast = extension()
    before = fast.threads() if fast is not None else 1
    with torch.inference_mode():
        alone = torch.cat([model(row[None]) for row in ids])
        try:
            if fast is not None:
                fast.set_threads(threads)
            assert torch.equal(model(ids), alone)
        finally:
            if fast is not None:
                fast.set_threads(before)


def layer_of(release: Path, slots: int) -> tuple[Experts, DiskExperts, ExpertCache]:
    """The routed experts of one layer in memory, and on disk."""
    model, cache = load_from_disk(Release(release), slots)
    experts = model.layers[1].ffn.experts
    assert isinstance(experts, DiskExperts)
    whole = load_model(release, keep_stored=True).pack().layers[1].ffn.experts
    return whole, experts, cache


def test_what_was_used_last_stays(release: Path) -> None:
    whole, experts, cache = layer_of(release, 4)
    x, gains = torch.randn(1, 96), torch.rand(1, 2)

    def use(*numbers: int) -> tuple[int, int]:
        before = cache.use.hits, cache.use.misses
        chosen = torch.tensor([numbers])
        with torch.inference_mode():
            experts.expect(chosen)  # and again inside: counted once
            assert torch.equal(experts(x, gains, chosen, 1), whole(x, gains, chosen, 1))
        return cache.use.hits - before[0], cache.use.misses - before[1]

    assert use(0, 1) == (0, 2)
    assert use(2, 3) == (0, 2)
    assert use(0, 1) == (2, 0)
    assert use(0, 4) == (1, 1)  # in place of 2 or 3
    assert use(1, 0) == (2, 0)
    assert use(5, 6) == (0, 2)
    assert use(0, 1) == (2, 0)
    assert use(2, 3) == (0, 2)
    size = cache.use.bytes_read // cache.use.misses
    specs = Release(release).specs
    assert size == sum(s.nbytes for n, s in specs.items() if n.startswith("layers.1.ffn.experts.0."))


def test_what_is_expected_and_not_used_gives_way(release: Path) -> None:
    whole, experts, cache = layer_of(release, 2)
    x, gains = torch.randn(1, 96), torch.rand(1, 3)
    with torch.inference_mode():
        for number in range(6):
            experts.expect(torch.tensor([[7, 8]]))
            chosen = torch.tensor([[number, number + 1, number + 2]])
            assert torch.equal(experts(x, gains, chosen, 1), whole(x, gains, chosen, 1))
    assert cache.use.waited_s >= 0


def test_no_token_needs_no_expert(release: Path) -> None:
    _, experts, cache = layer_of(release, 1)
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert experts(torch.randn(4, 96), torch.rand(0, 3), none, 0).shape == (0, 96)
    assert cache.use.misses == 0


def test_random_choices_in_random_passes(release: Path) -> None:
    rng = random.Random(1)
    for slots in (1, 3):
        whole, experts, _ = layer_of(release, slots)
        for seed in range(30):
            count = rng.choice([1, 2, 7, 40])
            generator = torch.Generator().manual_seed(seed)
            x, gains = torch.randn(count + 3, 96, generator=generator), torch.rand(count + 3, 3, generator=generator)
            chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(count + 3)])
            with torch.inference_mode():
                assert torch.equal(experts(x, gains, chosen, count), whole(x, gains, chosen, count))


# through the engine


def answers(engine: Engine, requests: list[Request]) -> dict[int, list[Event]]:
    numbers = [engine.add(request) for request in requests]
    events: dict[int, list[Event]] = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            events[event.request].append(event)
    return events


def requests_of(count: int) -> list[Request]:
    prompts = [tuple(ids_of(5 + 17 * i, seed=i).tolist()) for i in range(count)]
    return [
        Request(prompt=prompt, max_tokens=12, sampling=Sampling(seed=i), drafts=i % 3)
        for i, prompt in enumerate(prompts)
    ]


def test_the_engine_gives_the_same_tokens(release: Path) -> None:
    whole = Engine(load_model(release, keep_stored=True), budget=1 << 26)
    model, cache = load_from_disk(Release(release), 5)
    engine = Engine(model, budget=1 << 26, slots=3, step_tokens=20, expert_use=cache.use)
    got, want = answers(engine, requests_of(6)), answers(whole, requests_of(6))
    for number, events in want.items():
        assert [(e.token, e.logprob, e.finish) for e in got[number]] == [(e.token, e.logprob, e.finish) for e in events]
    assert engine.expert_use is not None and engine.expert_use.hits and engine.expert_use.misses


def test_a_failed_read_is_not_told_to_the_next_who_asks(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(release, folder)
    cache = ExpertCache(Release(folder), 4)
    fetch = ExpertCache._fetch

    def slow(self: ExpertCache, entry: Any, part: str, tensors: Any) -> None:  # the other expert's end comes late
        if part == "w2" and entry.slot != first:
            time.sleep(0.2)
        fetch(self, entry, part, tensors)

    monkeypatch.setattr(ExpertCache, "_fetch", slow)
    first = cache._free[-1]
    keys = [("layers.1.ffn.experts.", number) for number in (0, 1)]
    shards = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    for file in shards:
        os.truncate(file, 100)
    cache.expect(keys)
    with pytest.raises(CheckpointError, match="safetensors ends"):
        cache.arrived(keys[:1])
    for file, data in shards.items():
        file.write_bytes(data)
    there = cache.arrived(keys[1:])
    assert list(there) == keys[1:]


@pytest.mark.parametrize("where", ["prompt", "answer", "drafts"])
def test_a_shard_that_became_short_fails_the_request_and_not_the_engine(
    release: Path, tmp_path: Path, where: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(release, folder)
    model, _ = load_from_disk(Release(folder), 3)
    assert isinstance(model, Transformer)
    engine = Engine(model, budget=1 << 26)
    drafts = 2 if where == "drafts" else 0
    request = Request(prompt=tuple(ids_of(30).tolist()), max_tokens=30, sampling=Sampling(temperature=0), drafts=drafts)
    want = answers(engine, [request])
    sound = [event.token for events in want.values() for event in events]
    shards = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    saved = {file: file.read_bytes() for file in shards}
    number = engine.add(request)
    if where != "prompt":
        for _ in range(3):
            engine.step()
    waiting = engine.add(replace(request, n=2))
    for file in shards:
        os.truncate(file, 100)
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    last = [event for event in events if event.finish is not None]
    assert sorted((event.request, event.choice) for event in last) == [(number, 0), (waiting, 0), (waiting, 1)]
    for event in last:
        assert event.finish == "failed" and event.error is not None
        assert "safetensors ends" in event.error and "fetch it again" in event.error
    assert engine.memory.pages.free == engine.memory.pages.count
    assert engine.memory.slots.free == engine.memory.slots.count
    for file, data in saved.items():  # in place: the same files, mended
        file.write_bytes(data)
    again = answers(engine, [request])
    assert [event.token for events in again.values() for event in events] == sound


def test_an_unreadable_shard_is_named(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(release, folder)
    model, _ = load_from_disk(Release(folder), 3)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with torch.inference_mode(), pytest.raises(CheckpointError, match=r"safetensors cannot be read"):
        model(ids_of(1, 1))


def test_experts_of_several_types_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_release(preset("nano"), 1, "bf16", tmp_path / "r")
    release = Release(tmp_path / "r")
    name = "layers.1.ffn.experts.3.w2.weight"
    info = release.shards.info(name)
    release.shards.tensors[name] = replace(info, dtype="F32")
    with pytest.raises(CheckpointError, match=name):
        ExpertCache(release, 3)


def test_a_limit_below_what_is_held_is_refused_with_both_numbers(release: Path) -> None:
    with pytest.raises(InputError, match=r"needs \d+\.\d\d GiB.*--max-memory allows 0\.01 GiB: raise it"):
        plan_disk(Release(release), Numerics(), 10 << 20)


def test_more_memory_never_gives_less(release: Path) -> None:
    opened = Release(release)
    held = resident_bytes()  # of this process, after other tests
    plans = [plan_disk(opened, Numerics(), held + (more << 20)) for more in (500, 600, 1300, 7000)]
    for less, more in itertools.pairwise(plans):
        assert more.slots >= less.slots and more.cache >= less.cache and more.tokens >= less.tokens
    assert plans[-1].slots == EXPERTS * (LAYERS + 1)  # all there are, the draft's too


# the kernel's own mark of this address space: a child's ru_maxrss would also count its parent before exec
CHILD = """
import sys
from abyssal.cli.main import main
try:
    main()
finally:
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_stays_below_the_limit_and_the_answer_is_the_same(tmp_path: Path) -> None:
    """More experts than the whole process may hold."""
    nano = Path(sys.modules["abyssal"].__file__ or "").parent / "models" / "nano"
    config = replace(
        preset("nano"), hidden_size=1024, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_hash_layers=1,
        n_routed_experts=96, num_experts_per_tok=6, moe_intermediate_size=1024, num_nextn_predict_layers=1,
    )  # fmt: skip
    make_release(config, 3, "flash", tmp_path / "r")
    shutil.copy(nano / "tokenizer.json", tmp_path / "r")
    experts = sum(s.nbytes for n, s in Release(tmp_path / "r").specs.items() if ".ffn.experts." in n)

    def run(*arguments: str) -> tuple[dict[str, object], int]:
        command = [sys.executable, "-c", CHILD, "generate", "--model", str(tmp_path / "r"), "--json", *arguments,
                   "--ids", ",".join(map(str, ids_of(150).tolist())), "--max-tokens", "8", "--temperature", "0",
                   "--no-disk-cache", "--drafts", "1"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout), int(done.stderr.split("peak")[1])

    limit = 640 << 20
    answer, peak = run("--max-memory", "640MiB")
    whole, _ = run()
    assert peak < limit < experts
    assert answer["tokens"] == whole["tokens"] and answer["logprobs"] == whole["logprobs"]
    assert int(str(answer["expert_hits"])) > 0 and int(str(answer["expert_bytes_read"])) > experts // 2
    assert "expert_hits" not in whole
