"""Loop devices: a file as a block device, for file systems that mount no files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONTROL = "/dev/loop-control"
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR = 1, 4
_TRIES = 64  # another process may take the free one first


class _Info(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("device", "inode", "rdevice", "offset", "size_limit")),
        *((name, ctypes.c_uint32) for name in ("number", "encrypt_type", "encrypt_key_size", "flags")),
        ("names", ctypes.c_uint8 * 160),
        ("init", ctypes.c_uint64 * 2),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _Info),
        ("reserved", ctypes.c_uint64 * 8),
    )


@contextmanager
def loop(file: Path, *, writable: bool) -> Iterator[str]:
    """A device for a file, to be mounted in here; it goes with its last mount.

    Raises:
        OSError: the kernel refused.
    """
    mode = os.O_RDWR if writable else os.O_RDONLY
    backing = os.open(file, mode | os.O_CLOEXEC)
    try:
        name, device = _attached(backing, mode)
    finally:
        os.close(backing)
    try:
        yield name
    finally:
        os.close(device)


def _attached(backing: int, mode: int) -> tuple[str, int]:
    info = _Info(flags=_AUTOCLEAR | (0 if mode == os.O_RDWR else _READ_ONLY))
    config = bytes(_Config(fd=backing, info=info))
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            name = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            device = os.open(name, mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
                return name, device
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free")
