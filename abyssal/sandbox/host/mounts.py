"""Mounts that engines need: layers, overlays, disks of a fixed size, and the same files under other owners."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from abyssal.base.files import write_aside
from abyssal.sandbox.errors import ImageError, Unsupported
from abyssal.sandbox.host.loops import loop

_LIBC = ctypes.CDLL(None, use_errno=True)
# the same numbers on all architectures since Linux 5.2 and 5.12
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _MOVE_EMPTY_PATH = 1, os.O_CLOEXEC, 4
_ATTR_IDMAP = 0x00100000
_RDONLY, _NOSUID, _NODEV, _BIND = 1, 2, 4, 4096


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _mount(source: str, point: Path, kind: str, flags: int, options: str = "") -> None:
    words = (os.fsencode(source), os.fsencode(point), kind.encode())
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)), f"mount {kind or 'bind'}")


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageError(f"{what} cannot be mounted: {error}") from error


def mount_disk(file: Path, point: Path) -> None:
    """The ext4 file system in a file, to be written to. It dies with its host, so nothing waits for the disk.

    Raises:
        ImageError: the kernel refused.
    """
    with _refused(f"disk {file}"), loop(file, writable=True) as device:
        _mount(device, point, "ext4", _NOSUID | _NODEV, "nobarrier,noinit_itable")


def mount_layer(file: Path, point: Path) -> None:
    """The EROFS file system in a file, read-only.

    The kernel mounts the file itself, from 6.12 on; not where that lies on what is stacked already, such as overlayfs:
    the overlay above would be one too many.

    Raises:
        ImageError: the kernel refused.
    """
    flags = _RDONLY | _NOSUID | _NODEV
    with _refused(f"layer {file}"):
        if os.major(file.stat().st_dev):  # a file system on a disk
            try:
                _mount(str(file.resolve()), point, "erofs", flags)
                return
            except OSError as error:
                if error.errno != errno.ENOTBLK:
                    raise
        with loop(file, writable=False) as device:
            _mount(device, point, "erofs", flags)


def bind(folder: Path, point: Path) -> None:
    """A folder at another place too.

    Raises:
        ImageError: the kernel refused.
    """
    with _refused(f"folder {folder}"):
        _mount(str(folder), point, "", _BIND)


def unmount(point: str) -> None:
    """Take a mount away, at once for names and later for who still uses it; nothing happens where none is."""
    _LIBC.umount2(os.fsencode(point), 2)


def mounts_below(*folders: Path) -> list[str]:
    """Mount points in folders, deepest first. A host with many sandboxes has thousands of others."""
    tops = tuple(f"{folder}/" for folder in folders)
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split(" ", 5)[4]
        if "\\" in point:
            point = point.encode().decode("unicode_escape")
        if f"{point}/".startswith(tops):
            found.append(point)
    return sorted(found, key=lambda point: point.count("/"), reverse=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


class Owners:
    """A user namespace that says which owner on disk is which outside: `count` from 0 on are `base` and up.

    Our own root is owner `count` on disk: overlayfs works as the one who mounted it. A child of unshare(1) sleeps
    in the namespace for as long as this object is open.
    """

    def __init__(self, base: int, count: int = 65536):
        self.base, self.count = base, count
        self._child = subprocess.Popen(
            ["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    @cached_property
    def _fd(self) -> int:
        """The namespace, once the child is there."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(b"\n")
        self._child.stdin.flush()
        if not self._child.stdout.readline():
            raise Unsupported("this host has no user namespaces")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{self._child.pid}/{name}").write_text(f"0 {self.base} {self.count}\n{self.count} 0 1\n")
        return os.open(f"/proc/{self._child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """End the child; mounts keep what they need."""
        if "_fd" in self.__dict__:
            os.close(self._fd)
        self._child.communicate()

    def show(self, source: Path, point: Path) -> None:
        """Mount a folder elsewhere with these owners.

        Raises:
            Unsupported: the kernel cannot do that for this file system.
        """
        try:
            flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
            tree = _check(_LIBC.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags), "open_tree")
            try:
                attr = _MountAttr(attr_set=_ATTR_IDMAP, userns_fd=self._fd)
                size = ctypes.sizeof(attr)
                _check(
                    _LIBC.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attr), size), "mount_setattr"
                )
                _check(
                    _LIBC.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(point), _MOVE_EMPTY_PATH), "move_mount"
                )
            finally:
                os.close(tree)
        except OSError as error:
            raise Unsupported(f"files of {source} cannot be shown under other owners: {error}") from error


def overlay(lower: Sequence[Path], upper: Path, work: Path, point: Path) -> None:
    """Layers, highest first, with a writable one on top; what changes is copied whole, so an upper is a layer.

    Raises:
        ImageError: the kernel refused.
    """
    layers = ":".join(str(each) for each in lower)
    fixed = "redirect_dir=off,metacopy=off,index=off,xino=off,uuid=off,volatile"
    options = f"lowerdir={layers},upperdir={upper},workdir={work},{fixed}"
    with _refused(f"overlay {point}"):
        _mount("overlay", point, "overlay", 0, options)


def disk(size: int, templates: Path, file: Path) -> None:
    """An empty ext4 file system of a size in a sparse file.

    Raises:
        Unsupported: mkfs.ext4 is missing or refused.
    """
    template = templates / f"ext4-{size}"
    if not template.exists():
        mkfs = shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path="/sbin:/usr/sbin")
        if mkfs is None:
            raise Unsupported("disks of sandboxes need mkfs.ext4: apt-get install e2fsprogs")
        templates.mkdir(parents=True, exist_ok=True)
        with write_aside(template) as aside:
            os.truncate(aside, size)
            options = ["-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", "-m", "0", "-i", "4096"]
            done = subprocess.run([mkfs, "-q", *options, str(aside)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unsupported(f"mkfs.ext4 refused a disk of {size} bytes: {done.stderr.strip()}")
    _copy_sparse(template, file)


def _copy_sparse(source: Path, to: Path) -> None:
    with open(source, "rb") as old, open(to, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # only holes follow
                break
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.copy_file_range(old.fileno(), new.fileno(), end - at, at, at)
