"""Images from elsewhere: a folder, an OCI layout or `docker save` archive on disk, Debian packages (sandbox.md 3).

Archives come from strangers: every member is checked before it is written, nothing is written through a link, and no
device, socket or set-user bit comes along.
"""

from __future__ import annotations

import io
import json
import os
import platform
import posixpath
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from abyssal.sandbox.errors import ImageError, Unsupported
from abyssal.sandbox.host_image import skeleton
from abyssal.sandbox.image import Image, Store

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
OWNERS = 65536
EPOCH = "86400"  # the date that packages find while they are installed: the same packages, the same image
OF_HOST = ("etc/hostname", "etc/resolv.conf", "etc/machine-id", "etc/apt/sources.list")
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def from_folder(store: Store, name: str, folder: Path, env: Mapping[str, str] | None = None) -> Image:
    """An image of a root file system.

    Raises:
        ImageError, Unsupported: it cannot be packed.
    """
    image = Image(
        base=(store.pack(folder),),
        toolkit=(_toolkit(store, [folder]),),
        env=dict(env or {}),
        architecture=platform.machine(),
    )
    store.put(name, image)
    return image


def from_debian(store: Store, name: str, suite: str, packages: Sequence[str] = ()) -> Image:
    """An image of Debian packages, by mmdebstrap and this host's apt sources; nothing of this host comes along.

    Args:
        store, name: where it goes, and under which name.
        suite: such as bookworm.
        packages: besides what Debian calls essential, and apt.
    Raises:
        Unsupported: mmdebstrap is missing, or this is not root, who alone can give files to their owners.
        ImageError: it failed.
    """
    if os.geteuid() != 0:
        raise Unsupported("Debian images are made by root alone: the owners of their files have to be set")
    if shutil.which("mmdebstrap") is None:
        raise Unsupported("Debian images need mmdebstrap: apt-get install mmdebstrap")
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".debian.") as scratch:
        root = Path(scratch) / "root"
        include = [f"--include={','.join(packages)}"] if packages else []
        command = ["mmdebstrap", "--mode=root", "--variant=minbase", *include, suite, str(root)]
        env = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "LC_ALL": "C.UTF-8"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            said = "; ".join(line for line in done.stderr.splitlines() if line.startswith(("E:", "W:")))
            raise ImageError(f"mmdebstrap cannot make {suite}: {(said or done.stderr.strip())[:500]}")
        _tidy(root)
        return from_folder(store, name, root)


def _tidy(root: Path) -> None:
    """Take out what mmdebstrap copied from this host, devices, and what tells when it ran."""
    for name in OF_HOST:
        (root / name).unlink(missing_ok=True)
    for path in (root / "dev").iterdir():
        _clear(path)
    for name in ("var/log", "var/cache", "var/lib/apt/lists"):
        for path in (root / name).rglob("*"):
            if path.is_symlink() or not path.is_dir():
                path.unlink()


def from_archive(store: Store, name: str, archive: Path) -> Image:
    """An image of an OCI layout (a folder, or a tar of one) or a `docker save` archive.

    Raises:
        ImageError: it is none, is damaged, or holds what must not be unpacked.
    """
    try:
        if archive.is_dir():
            return _import(store, name, lambda path: open(_within(archive, path), "rb"))
        with tarfile.open(archive) as tar:
            return _import(store, name, lambda path: _member(tar, path))
    except (tarfile.TarError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ImageError(f"{archive} is no image archive that can be read: {error}") from error


def _within(folder: Path, path: str) -> Path:
    full = folder / path
    if not full.resolve().is_relative_to(folder.resolve()):
        raise ImageError(f"{path!r} leads out of {folder}")
    return full


def _member(tar: tarfile.TarFile, path: str) -> IO[bytes]:
    for candidate in (path, f"./{path}"):
        try:
            found = tar.extractfile(candidate)
        except KeyError:
            continue
        if found is not None:
            return found
    raise KeyError(path)


def _import(store: Store, name: str, fetch: Any) -> Image:
    config, layers = _manifest(fetch)
    architecture = ARCHITECTURES.get(config.get("architecture", ""), config.get("architecture", ""))
    if architecture and architecture != platform.machine():
        raise ImageError(f"the image is for {architecture}, this host is {platform.machine()}")
    digests, folders = [], []
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".import.") as scratch:
        for number, layer in enumerate(layers):
            folder = Path(scratch) / str(number)
            folder.mkdir(mode=0o755)
            with fetch(layer) as stream, tarfile.open(fileobj=io.BufferedReader(stream)) as tar:
                unpack_layer(tar, folder)
            digests.append(store.pack(folder))
            folders.append(folder)
        toolkit = _toolkit(store, folders)
    settings = config.get("config") or {}
    env = dict(each.split("=", 1) for each in settings.get("Env") or () if "=" in each)
    image = Image(base=tuple(digests), toolkit=(toolkit,), env=env, architecture=architecture)
    store.put(name, image)
    return image


def _manifest(fetch: Any) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Configuration and the paths of layers, lowest first."""
    try:
        with fetch("manifest.json") as file:
            saved = json.load(file)[0]
        with fetch(saved["Config"]) as file:
            return json.load(file), saved["Layers"]
    except (KeyError, FileNotFoundError):
        pass
    with fetch("index.json") as file:
        manifest = json.load(file)
    while "manifests" in manifest:
        own = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
        fitting = [each for each in manifest["manifests"] if each.get("platform", {}).get("architecture", own) == own]
        with fetch(_blob(fitting[0]["digest"])) as file:
            manifest = json.load(file)
    with fetch(_blob(manifest["config"]["digest"])) as file:
        return json.load(file), [_blob(each["digest"]) for each in manifest["layers"]]


def _blob(digest: str) -> str:
    kind, _, value = digest.partition(":")
    if not value or not value.isalnum() or not kind.isalnum():
        raise ImageError(f"{digest!r} is no digest")
    return f"blobs/{kind}/{value}"


def _toolkit(store: Store, below: Sequence[Path]) -> str:
    """A layer with what every sandbox has, as far as the layers below lack it."""
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".toolkit.") as scratch:
        root = Path(scratch) / "root"
        root.mkdir(mode=0o755)
        skeleton(root, below)
        return store.pack(root)


def unpack_layer(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack a layer; whiteouts of the archive become those of overlayfs.

    Raises:
        ImageError: a member leads out of the folder, or through a link.
    """
    folders: list[tuple[Path, tarfile.TarInfo]] = []
    for info in tar:
        name = posixpath.normpath(info.name.lstrip("/"))
        path = _place(folder, name, info.name)
        base = posixpath.basename(name)
        if base == OPAQUE:
            os.setxattr(path.parent, "trusted.overlay.opaque", b"y")
            continue
        if base.startswith(WHITEOUT):
            os.mknod(path.parent / base[len(WHITEOUT) :], 0o020000, os.makedev(0, 0))
            continue
        if not (info.isdir() and path.is_dir() and not path.is_symlink()):
            _clear(path)
        if info.isdir():
            path.mkdir(exist_ok=True)
            folders.append((path, info))
        elif info.issym():
            path.symlink_to(info.linkname)
        elif info.islnk():
            target = _place(folder, posixpath.normpath(info.linkname.lstrip("/")), info.name)
            os.link(target, path, follow_symlinks=False)
            continue
        elif info.isreg():
            content = tar.extractfile(info)
            assert content is not None
            with open(path, "xb") as file:
                shutil.copyfileobj(content, file)
        else:
            continue  # devices, FIFOs: the runtime makes those that there shall be
        os.chown(path, info.uid % OWNERS, info.gid % OWNERS, follow_symlinks=False)
        if not info.issym():
            path.chmod(info.mode & 0o1777)
    for path, info in reversed(folders):
        path.chmod(info.mode & 0o1777)


def _place(folder: Path, name: str, said: str) -> Path:
    if name == ".." or name.startswith("../") or "\0" in name:
        raise ImageError(f"the layer's {said!r} would leave the image")
    path = folder
    for part in posixpath.dirname(name).split("/"):
        path = path / part
        if path.is_symlink():
            raise ImageError(f"the layer's {said!r} lies behind a link")
        if not path.is_dir():
            path.mkdir()
    return folder / name


def _clear(path: Path) -> None:
    """A later member replaces an earlier one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
