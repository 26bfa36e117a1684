"""The guest's kernel: Debian's cloud kernel, unpacked into the state folder and never installed (sandbox.md 3).

`vmlinux` is taken out of `vmlinuz`, since QEMU starts it directly and the guest then need not decompress itself, which
takes seconds where processors are emulated. The modules are those that our machines need, in an order that works.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abyssal.base.files import write_folder
from abyssal.sandbox.errors import ImageError

PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_console", "virtio_rng", "erofs", "overlay")
_LZ4 = b"\x02\x21\x4c\x18"
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Kernel:
    """A kernel in the state folder.

    Attributes:
        compressed: as distributed, for boot loaders.
        plain: the same as an ELF file, for QEMU.
        modules: files in the order in which they load.
        digest: of all of it.
    """

    compressed: Path
    plain: Path
    modules: tuple[Path, ...]
    digest: str


def kernel(state: Path) -> Kernel:
    """The guest kernel, fetched with apt at its first use.

    Raises:
        ImageError: it is not there and cannot be fetched or unpacked.
    """
    folder = state / "kernel"
    if not (folder / "digest").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with write_folder(folder) as aside:
            _fetch(aside)
    modules = tuple(sorted((folder / "modules").iterdir()))
    return Kernel(folder / "vmlinuz", folder / "vmlinux", modules, (folder / "digest").read_text())


def _fetch(folder: Path) -> None:
    unpacked = folder / "package"
    unpacked.mkdir()
    name = _newest()
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name], unpacked)
    package = next(unpacked.glob("*.deb"))
    _run(["dpkg-deb", "-x", package.name, "."], unpacked)
    shutil.move(next((unpacked / "boot").glob("vmlinuz-*")), folder / "vmlinuz")
    (folder / "vmlinux").write_bytes(plain((folder / "vmlinuz").read_bytes()))
    (folder / "modules").mkdir()
    found = {_plainly(path.stem): path for path in unpacked.rglob("*.ko")}
    digest = hashlib.sha256((folder / "vmlinuz").read_bytes())
    for index, module in enumerate(ordered(MODULES, found)):
        digest.update(found[module].read_bytes())
        shutil.move(found[module], folder / "modules" / f"{index:02d}-{module}.ko")
    shutil.rmtree(unpacked)
    (folder / "digest").write_text(digest.hexdigest())


def _newest() -> str:
    """The package that the one without a version in its name stands for."""
    text = _run(["apt-cache", "depends", PACKAGE], Path("/"))
    for line in text.splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    raise ImageError(f"no package {PACKAGE} is known: run `apt-get update`; Debian's packages have it")


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ImageError(f"the guest kernel cannot be fetched without {command[0]}: it needs a Debian host") from error
    if done.returncode != 0:
        raise ImageError(f"the guest kernel was not fetched: {' '.join(command)} said {done.stderr.strip()[-300:]}")
    return done.stdout


def plain(image: bytes) -> bytes:
    """The ELF file inside a bzImage (its setup header says where); lz4 is what Debian packs with.

    Raises:
        ImageError: packed otherwise, damaged, or lz4 is missing.
    """
    begin = (image[0x1F1] + 1) * 512 + struct.unpack_from("<I", image, 0x248)[0]
    length = struct.unpack_from("<I", image, 0x24C)[0]
    packed = image[begin : begin + length - 4]  # the last four bytes are its unpacked size
    if packed.startswith(_ELF):
        return packed
    if not packed.startswith(_LZ4):
        raise ImageError(f"the guest kernel is packed in an unknown way, {packed[:4].hex()}; only lz4 is known")
    tool = shutil.which("lz4")
    if tool is None:
        raise ImageError("the guest kernel cannot be unpacked: run `apt-get install lz4`")
    done = subprocess.run([tool, "-dc"], input=packed, capture_output=True, check=False)
    if not done.stdout.startswith(_ELF):
        raise ImageError(f"the guest kernel is damaged: lz4 said {done.stderr.decode(errors='replace').strip()[-200:]}")
    return done.stdout


def ordered(wanted: Sequence[str], found: Mapping[str, Path]) -> list[str]:
    """Modules with all that they depend on, each after what it needs; what is built into the kernel is left out."""
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name not in found:
            return
        for needed in _needs(found[name]):
            add(needed)
        order.append(name)

    for name in wanted:
        add(name)
    return order


def _needs(module: Path) -> list[str]:
    data = module.read_bytes()
    begin = data.index(b"depends=") + len(b"depends=")
    return [_plainly(name) for name in data[begin : data.index(b"\0", begin)].decode().split(",") if name]


def _plainly(module: str) -> str:
    return module.replace("-", "_")
