"""The first root of a guest: the boot program, the agent and kernel modules, packed as the kernel reads it.

The format is cpio "newc" (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst). Names are sorted
and times are zero, so that the same parts give the same file.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path

from abyssal.base.files import write_bytes
from abyssal.sandbox.vm.kernel import Kernel

_FOLDERS = ("dev", "layers", "modules", "proc", "root", "scratch", "sys")


def initramfs(state: Path, kernel: Kernel, boot: Path, agent: Path) -> Path:
    """The packed file, made at its first use.

    Args:
        state: where it is kept, by the digest of its content.
        kernel: whose modules it gets.
        boot, agent: static programs.
    """
    files = {"init": boot.read_bytes(), "agent": agent.read_bytes()}
    files |= {f"modules/{path.name}": path.read_bytes() for path in kernel.modules}
    data = pack(files)
    path = state / "initramfs" / hashlib.sha256(data).hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    return path


def pack(files: Mapping[str, bytes]) -> bytes:
    """A cpio archive of executable files and of the folders that `boot` mounts into."""
    parts = [_entry(index, name, stat.S_IFDIR | 0o755, b"") for index, name in enumerate(_FOLDERS, 1)]
    parts += [
        _entry(index, name, stat.S_IFREG | 0o755, data)
        for index, (name, data) in enumerate(sorted(files.items()), len(parts) + 1)
    ]
    return b"".join([*parts, _entry(0, "TRAILER!!!", 0, b"")])


def _entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
