"""Reads past the page cache against plain ones: any place, any size, the odd end of a file."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from abyssal.base.errors import CheckpointError
from abyssal.checkpoint import direct
from abyssal.checkpoint.direct import DIRECT, NEIGHBOUR, PAGE, DirectFiles
from abyssal.checkpoint.shards import StoredTensor

SIZES = (3 * PAGE + 1, 5 * NEIGHBOUR + 777, 4 * PAGE, 1)  # of files


@pytest.fixture
def files(tmp_path: Path) -> dict[Path, bytes]:
    found = {}
    for number, size in enumerate(SIZES):
        path = tmp_path / f"{number}.safetensors"
        found[path] = random.Random(number).randbytes(size)
        path.write_bytes(found[path])
    return found


def part(path: Path, start: int, count: int) -> StoredTensor:
    return StoredTensor("", "U8", (count,), path, start, count)


def random_parts(files: dict[Path, bytes], rng: random.Random) -> list[StoredTensor]:
    parts = []
    for _ in range(rng.randint(1, 5)):
        path, data = rng.choice(list(files.items()))
        start = rng.choice([0, rng.randrange(len(data) + 1), len(data) // PAGE * PAGE])
        left = len(data) - start
        parts.append(part(path, start, rng.choice([0, min(1, left), rng.randrange(left + 1), left])))
    return parts


def check(reader: DirectFiles, files: dict[Path, bytes], parts: list[StoredTensor]) -> None:
    for tensor, found in zip(parts, reader.read(parts), strict=True):
        assert bytes(found.numpy()) == files[tensor.file][tensor.start : tensor.start + tensor.nbytes]


@pytest.mark.parametrize("seed", range(40))
def test_any_parts_of_any_files(files: dict[Path, bytes], seed: int) -> None:
    rng, reader = random.Random(seed), DirectFiles()
    for _ in range(10):
        check(reader, files, random_parts(files, rng))


def test_neighbours_share_a_read(files: dict[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(files)[1]
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(a[2]) or real(*a))  # type: ignore[func-returns-value]
    check(DirectFiles(), files, [part(path, 5000, 100), part(path, 4500, 500)])
    assert calls == [PAGE]
    check(DirectFiles(), files, [part(path, 0, 10), part(path, 10 + NEIGHBOUR + 1, 10)])
    assert len(calls) == 3


def test_threads_do_not_share_buffers(files: dict[Path, bytes]) -> None:
    reader = DirectFiles()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            check(reader, files, random_parts(files, rng))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


@pytest.mark.skipif(not DIRECT, reason="no direct reads on this system")
def test_a_file_system_without_direct_reads(files: dict[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags)

    monkeypatch.setattr(direct.os, "open", refuse)
    check(DirectFiles(), files, random_parts(files, random.Random(1)))


def test_what_cannot_be_read_is_named(files: dict[Path, bytes], tmp_path: Path) -> None:
    path, data = next(iter(files.items()))
    reader = DirectFiles()
    with pytest.raises(CheckpointError, match=r"0\.safetensors ends 5 bytes too early: fetch it again"):
        reader.read([part(path, 100, len(data) - 95)])
    check(reader, files, [part(path, 0, len(data))])  # and nothing is broken
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match=r"0\.safetensors ends \d+ bytes too early"):
        reader.read([part(path, 0, len(data))])
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read \(No such file"):
        reader.read([part(tmp_path / "none.safetensors", 0, 1)])


def test_files_are_closed_with_their_reader(files: dict[Path, bytes]) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("open files are counted in Linux's /proc")
    path = next(iter(files))

    def held() -> int:
        return sum(os.path.realpath(fd) == str(path.resolve()) for fd in folder.iterdir())

    reader = DirectFiles()
    reader.read([part(path, 0, 1)])
    assert held() == 1
    del reader
    assert held() == 0
