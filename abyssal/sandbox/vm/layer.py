"""What a guest has written, as an image layer: the upper folder of its overlay, read from its disk."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from abyssal.base.files import sha256_of, write_json
from abyssal.sandbox.engines.bundle import SCRUBBED
from abyssal.sandbox.errors import ImageError
from abyssal.sandbox.image import pack
from abyssal.sandbox.vm.ext4 import ROOT, Ext4, Inode

_UPPER = b"upper"
_OPAQUE = "trusted.overlay.opaque"
_DEEPEST = 200
_KEPT = ("user.", "security.capability", "system.")


def packed(disk: Path, folder: Path) -> str:
    """Pack a layer into a folder, as "layer.erofs" and "layer.json".

    Returns:
        its digest.
    Raises:
        ImageError: the guest has damaged its disk.
    """
    layer = folder / "layer.erofs"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".upper.") as name:
        _unpack(disk, Path(name) / "upper")
        pack(Path(name) / "upper", layer, SCRUBBED)
    digest = sha256_of(layer)
    write_json(folder / "layer.json", {"digest": digest, "scrubbed": list(SCRUBBED)})
    return digest


def _unpack(disk: Path, target: Path) -> None:
    reader = Ext4(disk)
    try:
        names = reader.names(reader.inode(ROOT))
        if _UPPER not in names:
            raise ImageError("the disk of a guest is damaged: it has no upper folder")
        _folder(reader, reader.inode(names[_UPPER]), target, (), {})
    finally:
        reader.close()


def _folder(reader: Ext4, inode: Inode, target: Path, above: Sequence[int], seen: dict[int, Path]) -> None:
    if not stat.S_ISDIR(inode.mode) or inode.number in above or len(above) > _DEEPEST:
        raise ImageError("the disk of a guest is damaged: its folders")
    target.mkdir()
    for name, number in sorted(reader.names(inode).items()):
        path, child = target / os.fsdecode(name), reader.inode(number)
        if stat.S_ISDIR(child.mode):
            _folder(reader, child, path, (*above, inode.number), seen)
        elif number in seen:
            os.link(seen[number], path, follow_symlinks=False)
        else:
            seen[number] = path
            _file(reader, child, path)
    _dress(reader, inode, target)


def _file(reader: Ext4, inode: Inode, path: Path) -> None:
    if stat.S_ISREG(inode.mode):
        with path.open("xb") as file:
            for at, data in reader.parts(inode):
                file.seek(at)
                file.write(data)
            file.truncate(inode.size)
    elif stat.S_ISLNK(inode.mode):
        os.symlink(reader.target(inode), os.fsencode(path))
    elif inode.whiteout:
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        return
    elif stat.S_ISFIFO(inode.mode):
        os.mkfifo(path)
    else:  # devices and sockets belong to a machine, not to a layer
        return
    _dress(reader, inode, path)


def _dress(reader: Ext4, inode: Inode, path: Path) -> None:
    """Owner, rights and attributes; overlayfs' own notes about other layers are not for a new place."""
    os.chown(path, inode.uid, inode.gid, follow_symlinks=False)
    if stat.S_ISLNK(inode.mode):
        return
    for name, value in reader.extended(inode).items():
        if name == _OPAQUE or name.startswith(_KEPT):
            os.setxattr(path, name, value, follow_symlinks=False)
    os.chmod(path, stat.S_IMODE(inode.mode))
