"""The cache on disk under kills, damage, full disks and company: never a wrong token, at worst a miss."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from abyssal.base.errors import InputError
from abyssal.engine.disk_cache import ABANDONED_S, DiskCache
from abyssal.engine.engine import Engine
from abyssal.engine.prefix_cache import PrefixCache
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampling
from tests.cases import random_config, random_ids, random_model
from tests.faults import ROOT, kill_after, largest_file

SEED = 0
PROMPT = random_ids(random_config(SEED), 700, 3)


def engine_on(folder: Path, budget: int = 1 << 30) -> Engine:
    model = random_model(random_config(SEED), SEED, torch.float32)
    disk = DiskCache(folder, budget)
    return Engine(model, budget=1 << 28, slots=4, prefix=lambda m: PrefixCache(m, "test", policy="full", disk=disk))


def answer(engine: Engine, prompt: list[int] | None = None) -> tuple[list[int], list[float], int, str]:
    request = Request(prompt=tuple(prompt or PROMPT), max_tokens=4, sampling=Sampling(temperature=0))
    number, events = engine.stream(request)
    list(events)
    record = engine.records[number]
    return record.answers[0].tokens, record.answers[0].logprobs, record.prefix.hit, record.prefix.reason


@pytest.fixture(scope="module")
def want() -> tuple[list[int], list[float]]:
    model = random_model(random_config(SEED), SEED, torch.float32)
    engine = Engine(model, budget=1 << 28, slots=4)
    return answer(engine)[:2]


def test_a_second_process_finds_the_prefix(tmp_path: Path, want: tuple[list[int], list[float]]) -> None:
    tokens, logprobs, hit, reason = answer(engine_on(tmp_path))
    assert (tokens, logprobs, hit) == (*want, 0) and reason == "nothing is cached for this model"
    tokens, logprobs, hit, _ = answer(engine_on(tmp_path))
    assert (tokens, logprobs, hit) == (*want, 640)


def test_flipped_and_lost_bytes_are_misses_with_a_reason(
    tmp_path: Path, want: tuple[list[int], list[float]]
) -> None:
    rng = random.Random(1)
    reasons = []
    for round_ in range(25):
        answer(engine_on(tmp_path))
        files = sorted(tmp_path.glob("??/*.kv"))
        for path in rng.sample(files, 1 if round_ % 2 else 4):
            data = bytearray(path.read_bytes())
            if rng.random() < 0.3:
                data = data[: rng.randrange(len(data))]
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        tokens, logprobs, hit, reason = answer(engine_on(tmp_path))
        assert (tokens, logprobs) == want
        assert hit in range(0, 641, 128)
        reasons.append(reason)
    assert any("its file was damaged (the checksum is wrong)" in reason for reason in reasons)


def test_a_file_under_another_key_is_no_entry(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 1 << 20)
    disk.put("ab" * 32, [torch.ones(3)])
    (path,) = tmp_path.glob("ab/*.kv")
    (tmp_path / "cd").mkdir()
    path.rename(tmp_path / "cd" / ("cd" * 32 + ".kv"))
    found = disk.get("cd" * 32)
    assert found.tensors is None and "another key" in found.reason
    assert disk.get("cd" * 32).reason == "not on disk", "what is damaged goes away"


WRITER = """
import sys
from pathlib import Path
from tests.engine.test_disk_cache import answer, engine_on
from tests.cases import random_config, random_ids
print("go", flush=True)
n = 0
while True:
    answer(engine_on(Path(sys.argv[1])), random_ids(random_config(0), 700, 3 + n % 3))
    n += 1
"""


@pytest.mark.parametrize("delay", [0.02, 0.15, 0.4, 0.9])
def test_a_kill_leaves_no_wrong_token(delay: float, tmp_path: Path, want: tuple[list[int], list[float]]) -> None:
    kill_after(delay, WRITER, str(tmp_path))
    for _ in range(2):
        assert answer(engine_on(tmp_path))[:2] == want
    assert answer(engine_on(tmp_path))[2] == 640


def test_two_processes_share_a_folder_that_is_too_small(tmp_path: Path, want: tuple[list[int], list[float]]) -> None:
    """Both write, read and remove each other's entries all the time."""
    size = sum(p.stat().st_size for p in tmp_path.glob("??/*")) or 200_000
    script = WRITER.replace("engine_on(Path(sys.argv[1]))", f"engine_on(Path(sys.argv[1]), {size})")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, env=environment
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        end = time.monotonic() + 4
        hits = []
        while time.monotonic() < end:
            tokens, logprobs, hit, _ = answer(engine_on(tmp_path, size))
            assert (tokens, logprobs) == want
            hits.append(hit)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert len(hits) > 3


def test_a_full_disk_is_noted_and_costs_only_the_entry(
    tmp_path: Path, want: tuple[list[int], list[float]]
) -> None:
    engine = engine_on(tmp_path)
    with largest_file(1000):
        assert answer(engine)[:2] == want
    assert engine.prefix is not None and engine.prefix.disk is not None
    assert "File too large" in str(engine.prefix.disk.problem)
    assert not list(tmp_path.glob("??/*")) and not list(tmp_path.glob("??/.*"))
    assert answer(engine_on(tmp_path))[:2] == want


def test_the_budget_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 20_000)
    for n in range(40):
        disk.put(f"{n:064x}", [torch.zeros(200)])
        path = tmp_path / f"{n:064x}"[:2] / f"{n:064x}.kv"
        os.utime(path, (n, n))
        assert sum(p.stat().st_size for p in tmp_path.glob("??/*")) <= 20_000
    assert f"{39:064x}" in disk and f"{0:064x}" not in disk
    disk.put("f" * 64, [torch.zeros(20_000)])
    assert "f" * 64 not in disk and f"{39:064x}" in disk, "what can never fit evicts nothing"
    disk.clear()
    assert not list(tmp_path.glob("??/*"))


def test_the_first_pages_of_a_prefix_are_the_last_to_go(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 1 << 20)
    keys = [f"{n:064x}" for n in range(5)]
    for key in reversed(keys):
        disk.put(key, [torch.zeros(1)])
    disk.touch(keys)
    times = [(tmp_path / key[:2] / f"{key}.kv").stat().st_mtime for key in keys]
    assert times == sorted(times, reverse=True) and len(set(times)) == 5


def test_what_a_dead_process_left_aside_is_swept(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, new = tmp_path / "ab" / ".old", tmp_path / "ab" / ".new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    past = time.time() - ABANDONED_S - 10
    os.utime(old, (past, past))
    DiskCache(tmp_path, 1 << 20)
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold a cache"):
        DiskCache(tmp_path / "file" / "cache", 100)
