"""Read an ext4 disk that a guest wrote, without the host's kernel.

The guest's root may have written any bytes to its disk, and file systems of kernels are not made for that. This reader
knows what our own disks have (extents, no journal, no encryption), refuses all else, and what a damaged disk can do to
it is an `ImageError`.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from abyssal.sandbox.errors import ImageError

ROOT = 2
_KNOWN = 0x2 | 0x40 | 0x80 | 0x200  # file types in folders, extents, 64 bit, flexible groups
_PREFIXES = {1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}
_DEEPEST = 5
_EXTENTS = 0x80000
_LARGEST = 1 << 40
_LINK_MOST = 4096
_WRITTEN = 32768  # blocks of an extent; a larger number says that it is reserved and not written
_OFTEN = 4  # how many times the size of the disk is read before it is taken to be a trap


@dataclass(frozen=True)
class Inode:
    """A file, folder, link or device, as the disk has it."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    flags: int
    block: bytes
    attributes: int
    raw: bytes

    @property
    def whiteout(self) -> bool:
        """Whether it says that a layer below has something which is gone (overlayfs)."""
        return stat.S_ISCHR(self.mode) and self.block[:8] == bytes(8)


class Ext4:
    """A disk, open for reading."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._end = path.stat().st_size
        self._left = self._end * _OFTEN
        try:
            self._begin(path.name, self._bytes(1024, 1024))
        except ImageError:
            self.close()
            raise

    def _begin(self, name: str, head: bytes) -> None:
        if struct.unpack_from("<H", head, 56)[0] != 0xEF53:
            raise ImageError(f"{name} is no ext4 disk")
        (incompatible,) = struct.unpack_from("<I", head, 96)
        if incompatible & ~_KNOWN:
            raise ImageError(f"{name} has features that our disks do not have: {incompatible & ~_KNOWN:#x}")
        self._inodes, shift = struct.unpack_from("<I", head, 0)[0], struct.unpack_from("<I", head, 24)[0]
        self._size = 1024 << min(shift, 6)
        self._per_group = max(1, struct.unpack_from("<I", head, 40)[0])
        self._inode_size = max(128, struct.unpack_from("<H", head, 88)[0])
        self._entry = struct.unpack_from("<H", head, 254)[0] if incompatible & 0x80 else 32
        self._table = (2 if self._size == 1024 else 1) * self._size

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

    def inode(self, number: int) -> Inode:
        """By its number.

        Raises:
            ImageError: there is none.
        """
        if not 0 < number <= self._inodes:
            raise ImageError(f"the disk of a guest is damaged: inode {number} of {self._inodes}")
        group, index = divmod(number - 1, self._per_group)
        entry = self._bytes(self._table + group * self._entry, 32)
        at = struct.unpack_from("<I", entry, 8)[0] * self._size + index * self._inode_size
        raw = self._bytes(at, self._inode_size)
        mode, uid, low, _, _, mtime = struct.unpack_from("<HHIIII", raw)
        (gid,) = struct.unpack_from("<H", raw, 24)
        (flags,) = struct.unpack_from("<I", raw, 32)
        attributes, high = struct.unpack_from("<II", raw, 104)
        uid_high, gid_high = struct.unpack_from("<HH", raw, 120)
        size = low | high << 32
        if size > _LARGEST:
            raise ImageError(f"the disk of a guest is damaged: a file of {size} bytes")
        owner = (uid | uid_high << 16, gid | gid_high << 16)
        return Inode(number, mode, *owner, size, mtime, flags, raw[40:100], attributes, raw)

    def parts(self, inode: Inode) -> Iterator[tuple[int, bytes]]:
        """Offsets and bytes of what is written of a file; the rest is zeros."""
        for first, count, start in self._extents(inode.block, 0) if inode.flags & _EXTENTS else ():
            for index in range(count):
                at = (first + index) * self._size
                if at >= inode.size:
                    return
                yield at, self._bytes((start + index) * self._size, min(self._size, inode.size - at))

    def _extents(self, node: bytes, depth: int) -> Iterator[tuple[int, int, int]]:
        magic, entries, _, level = struct.unpack_from("<HHHH", node)
        if magic != 0xF30A or depth > _DEEPEST or 12 + entries * 12 > len(node):
            raise ImageError("the disk of a guest is damaged: a list of extents")
        for index in range(entries):
            at = 12 + index * 12
            if level == 0:
                first, count, high, low = struct.unpack_from("<IHHI", node, at)
                if count <= _WRITTEN:
                    yield first, count, low | high << 32
            else:
                _, low, high = struct.unpack_from("<IIH", node, at)
                yield from self._extents(self._bytes((low | high << 32) * self._size, self._size), depth + 1)

    def target(self, inode: Inode) -> bytes:
        """Of a symbolic link."""
        if inode.size < 60 and not inode.flags & _EXTENTS:
            return inode.block[: inode.size]
        if inode.size > _LINK_MOST:
            raise ImageError("the disk of a guest is damaged: a link")
        return b"".join(data for _, data in self.parts(inode))

    def names(self, inode: Inode) -> dict[bytes, int]:
        """What a folder holds: inode numbers by name."""
        found: dict[bytes, int] = {}
        for _, data in self.parts(inode):
            at = 0
            while at + 8 <= len(data):
                number, step, length = struct.unpack_from("<IHB", data, at)
                name = data[at + 8 : at + 8 + length]
                if step < 8 or b"/" in name or b"\0" in name:
                    raise ImageError("the disk of a guest is damaged: a folder")
                if number and name not in (b".", b"..", b""):
                    found[name] = number
                at += step
        return found

    def extended(self, inode: Inode) -> Mapping[str, bytes]:
        """Extended attributes."""
        found: dict[str, bytes] = {}
        if len(inode.raw) > 132:
            begin = 128 + struct.unpack_from("<H", inode.raw, 128)[0]
            if inode.raw[begin : begin + 4] == b"\x00\x00\x02\xea":
                found |= _attributes(inode.raw[begin + 4 :], 0)
        if inode.attributes:
            found |= _attributes(self._bytes(inode.attributes * self._size, self._size), 32)
        return found

    def _bytes(self, at: int, size: int) -> bytes:
        if at < 0 or at + size > self._end:
            raise ImageError("the disk of a guest is damaged: it points beyond its end")
        self._left -= size
        if self._left < 0:
            raise ImageError("the disk of a guest is damaged: it says that it holds more than it can")
        self._file.seek(at)
        return self._file.read(size)


def _attributes(area: bytes, at: int) -> dict[str, bytes]:
    """Entries from a place on; values count from the begin of the area."""
    found: dict[str, bytes] = {}
    while at + 16 <= len(area) and area[at : at + 4] != bytes(4):
        length, index, offset, _, size = struct.unpack_from("<BBHII", area, at)
        name = area[at + 16 : at + 16 + length].decode(errors="replace")
        if index in _PREFIXES and offset + size <= len(area):
            found[_PREFIXES[index] + name] = area[offset : offset + size]
        at += 16 + -(-length // 4) * 4
    return found
