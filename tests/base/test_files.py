"""Files appear whole or not at all, whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from abyssal.base.errors import AbyssalError, InputError, RunError, SaveError
from abyssal.base.files import sha256_of, write_aside, write_bytes, write_folder, write_json
from tests.faults import kill_after, largest_file


@pytest.fixture
def full_disk() -> Iterator[None]:
    with largest_file(1000):
        yield


def test_writing_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_bytes(path, b"old")
    write_json(path, {"key": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"key": "ä"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), write_aside(path) as aside:
        aside.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(SaveError, match="unchanged"):
        write_bytes(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"no/such/a: No such file"):
        write_bytes(tmp_path / "no/such/a", b"")
    with pytest.raises(SaveError, match="No such file"), write_folder(tmp_path / "no/such"):
        pass


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with write_folder(tmp_path / "f") as aside:
            (aside / text).write_text(text)
            (aside / "sub").mkdir()
            (aside / "sub" / "x").write_text(text)
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["sub", "two"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o777 & ~current_umask()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with write_folder(tmp_path / "f") as aside:
        (aside / "kept").write_text("kept")
    with pytest.raises(error), write_folder(tmp_path / "f") as aside:
        (aside / "half").write_text("half")
        raise error
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["kept"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize(("rename", "kept"), [(1, "old"), (2, "new")])
def test_a_failure_right_after_a_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int, kept: str, error: type[BaseException]
) -> None:
    with write_folder(tmp_path / "f") as aside:
        (aside / "old").write_text("old")
    real, count = os.replace, [0]

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        count[0] += 1
        if count[0] == rename:
            raise error

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises((KeyboardInterrupt, SaveError)), write_folder(tmp_path / "f") as aside:
        (aside / "new").write_text("new")
    assert [p.name for p in (tmp_path / "f").iterdir()] == [kept]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_kill_leaves_an_old_or_a_new_file_and_never_a_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    script = (
        "import sys; from abyssal.base.files import write_bytes\n"
        "print('ready', flush=True)\n"
        "for i in range(10**6): write_bytes(sys.argv[1], bytes([i % 256]) * 300_000)"
    )
    for delay in (0.02, 0.05, 0.11):
        kill_after(delay, script, str(path))
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 300_000 and len(set(data)) == 1


def test_the_tree_of_errors_decides_the_exit_code() -> None:
    assert issubclass(SaveError, RunError) and not issubclass(SaveError, InputError)
    assert issubclass(InputError, AbyssalError) and issubclass(RunError, AbyssalError)
