"""Layers and disks are mounted by the kernel alone, from wherever their files lie, and leave no loop device behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from abyssal.sandbox.errors import ImageError
from abyssal.sandbox.host import mounts
from abyssal.sandbox.image import pack

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts"),
    pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="apt-get install erofs-utils"),
    pytest.mark.skipif(not Path("/dev/loop-control").exists(), reason="this host has no loop devices"),
]


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a point"  # a blank is written otherwise in the kernel's list
    path.mkdir()
    yield path
    for each in mounts.mounts_below(path):
        mounts.unmount(each)


def loops_of(file: Path) -> list[str]:
    found = Path("/sys/block").glob("loop*/loop/backing_file")
    return [path.parts[3] for path in found if path.read_text().strip() == str(file)]


def test_a_layer_from_a_disk_and_from_memory(tmp_path: Path, point: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("text")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for layer in (tmp_path / "layer.erofs", Path(memory) / "layer.erofs"):
            pack(root, layer, ())
            mounts.mount_layer(layer, point)
            assert (point / "file").read_text() == "text"
            with pytest.raises(OSError, match="Read-only"):
                (point / "other").touch()
            assert mounts.mounts_below(point, tmp_path / "elsewhere") == [str(point)]
            mounts.unmount(str(point))
            assert mounts.mounts_below(point) == []
            _gone(layer)


def test_a_disk_keeps_what_is_written_within_its_size(tmp_path: Path, point: Path) -> None:
    disk = tmp_path / "disk.img"
    mounts.disk(16 << 20, tmp_path / "templates", disk)
    mounts.mount_disk(disk, point)
    assert len(loops_of(disk)) == 1
    (point / "file").write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="No space"):
        (point / "more").write_bytes(bytes(17 << 20))
    mounts.unmount(str(point))
    _gone(disk)
    mounts.mount_disk(disk, point)
    assert (point / "file").read_bytes() == b"x" * 1000


def test_what_is_no_layer_is_an_image_error(tmp_path: Path, point: Path) -> None:
    (tmp_path / "layer.erofs").write_bytes(bytes(65536))
    with pytest.raises(ImageError, match=r"layer\.erofs"):
        mounts.mount_layer(tmp_path / "layer.erofs", point)
    assert mounts.mounts_below(point) == []
    _gone(tmp_path / "layer.erofs")


def _gone(file: Path) -> None:
    end = time.monotonic() + 5
    while loops_of(file) and time.monotonic() < end:  # the kernel lets go of them a little later
        time.sleep(0.01)
    assert loops_of(file) == []
