"""Disks of guests: sparse copies, an empty writable one, one that a BIOS can start.

A guest reads EROFS layers that all share, and writes to a disk of its own. That one is a sparse file of raw blocks: a
copy costs what is in use, so that a fork needs no chain of overlays.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from abyssal.base.files import write_aside
from abyssal.sandbox.errors import ImageError

MIB = 1 << 20
_SECTOR = 512
_FAR = b"\xfe\xff\xff"  # says that only the sector numbers count, not heads and cylinders
_BOOT_FROM = MIB  # where partitions begin by custom


def copy_sparse(source: int, target: int) -> None:
    """Copy an open file to another, of which only what is not a hole is written."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            at += os.sendfile(target, source, at, min(end - at, 64 * MIB))


def copy_file(source: Path, target: Path) -> None:
    """Copy a sparse file under another name."""
    with source.open("rb") as reading, target.open("wb") as writing:
        copy_sparse(reading.fileno(), writing.fileno())


def scratch(path: Path, size: int) -> None:
    """An empty ext4 disk. It has no journal, since it does not outlive a crash of its guest.

    Raises:
        ImageError: mke2fs is missing or refused the size.
    """
    with path.open("wb") as file:
        file.truncate(size)
    _run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1", str(path)])


def bootable(path: Path, kernel: Path, initramfs: Path, command_line: str, root: Path) -> None:
    """A qcow2 disk that SeaBIOS starts: boot sector, a FAT partition with SYSLINUX and kernel, an EROFS partition.

    Args:
        path: to write.
        kernel: compressed, as boot loaders want it.
        initramfs: that finds the second partition.
        command_line: of the kernel.
        root: the EROFS file.
    Raises:
        ImageError: a tool is missing.
    """
    begin = _BOOT_FROM
    boot = -(-(kernel.stat().st_size + initramfs.stat().st_size + 4 * MIB) // MIB) * MIB
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        fat, raw, config = folder / "fat", folder / "raw", folder / "syslinux.cfg"
        entry = f"LABEL abyssal\n LINUX vmlinuz\n INITRD initrd\n APPEND {command_line}\n"
        config.write_text(f"DEFAULT abyssal\nPROMPT 0\nTIMEOUT 0\n{entry}")
        with fat.open("wb") as file:
            file.truncate(boot)
        _run(
            ["mformat", "-i", str(fat), "-T", str(boot // _SECTOR), "-h", "64", "-s", "32", "-H", str(begin // _SECTOR)]
        )
        for source, target in ((kernel, "vmlinuz"), (initramfs, "initrd"), (config, "syslinux.cfg")):
            _run(["mcopy", "-i", str(fat), str(source), f"::{target}"])
        _run(["syslinux", "--install", str(fat)])
        sizes = (boot, -(-root.stat().st_size // MIB) * MIB)
        with raw.open("wb") as disk:
            disk.truncate(begin + sum(sizes))
            disk.write(_boot_sector(begin, sizes))
            for part, at in ((fat, begin), (root, begin + boot)):
                disk.seek(at)
                with part.open("rb") as file:
                    shutil.copyfileobj(file, disk, MIB)
        with write_aside(path) as aside:
            _run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(aside)])


def _boot_sector(begin: int, sizes: Sequence[int]) -> bytes:
    """SYSLINUX' boot code and a partition table: the first one FAT and active, the others Linux."""
    try:
        code = Path("/usr/lib/syslinux/mbr/mbr.bin").read_bytes()
    except OSError as error:
        raise ImageError("a disk cannot be made bootable: run `apt-get install syslinux syslinux-common`") from error
    table, at = b"", begin
    for index, size in enumerate(sizes):
        active, kind = (0x80, 0x0C) if index == 0 else (0, 0x83)
        table += struct.pack(
            "<B3sB3sII", active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", at // _SECTOR, size // _SECTOR
        )
        at += size
    return code[:440].ljust(446, b"\0") + table.ljust(64, b"\0") + b"\x55\xaa"


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        remedy = "run `apt-get install e2fsprogs mtools syslinux syslinux-common qemu-utils`"
        raise ImageError(f"a disk cannot be made without {command[0]}: {remedy}") from error
    if done.returncode != 0:
        raise ImageError(f"a disk was not made: {command[0]} said {(done.stderr or done.stdout).strip()[-300:]}")
