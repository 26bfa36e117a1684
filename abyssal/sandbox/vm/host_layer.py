"""The image "host" for virtual machines: this host's base system, packed from its own packages as one EROFS layer.

A guest cannot see the host's files, and all of them would be too much and not for its eyes. So it gets what dpkg knows
of the required packages and Python, without documentation; settings and accounts are those of containers.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from abyssal.sandbox.errors import ImageError, NotFound
from abyssal.sandbox.host_image import PROGRAMS, fill
from abyssal.sandbox.image import Image, Store

_WANTED = ("python3-minimal", "python3")  # the whole of it where it is there
_LEFT_OUT = re.compile(r"/usr/share/(doc|man|locale|info|lintian|bug)/")
_TOP = tuple(f"/{name}/" for name in PROGRAMS)


def host_image(store: Store) -> Image:
    """The image, packed at its first use and again when a package changes.

    Raises:
        ImageError: this host has no dpkg, or a file cannot be packed.
    """
    packages = _packages()
    name = f"host-vm-{hashlib.sha256(repr(packages).encode()).hexdigest()[:32]}"
    try:
        return store.get(name)
    except (ImageError, NotFound):
        pass
    listed = _run(["dpkg-query", "-L", *(package for package, _version in packages)]).splitlines()
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".host.") as folder:
        root = Path(folder) / "root"
        fill(root)
        _copy(listed, root)
        image = Image(base=(store.pack(root),))
    store.put(name, image)
    return image


def _packages() -> list[tuple[str, str]]:
    """Name and version of the required packages, of Python, and of all that they depend on."""
    form = "${Package}\t${Version}\t${Priority}\t${db:Status-Status}\t${Provides}\t${Pre-Depends},${Depends}\n"
    versions: dict[str, str] = {}
    needs: dict[str, str] = {}
    provided: dict[str, str] = {}
    todo = list(_WANTED)
    for line in _run(["dpkg-query", "-W", "-f", form]).splitlines():
        name, version, priority, status, provides, depends = line.split("\t")
        if status != "installed":
            continue
        versions[name], needs[name] = version, depends
        provided |= dict.fromkeys(_names(provides), name)
        if priority == "required":
            todo.append(name)
    chosen: set[str] = set()
    while todo:
        name = todo.pop()
        name = name if name in versions else provided.get(name, "")
        if name and name not in chosen:
            chosen.add(name)
            todo += _names(needs[name])
    return sorted((name, versions[name]) for name in chosen)


def _names(relation: str) -> list[str]:
    """Names in a field such as "a (>= 1), b | c"; of alternatives all that are installed will be taken."""
    return [part.split("(")[0].split(":")[0].strip() for part in re.split(r"[,|]", relation) if part.strip()]


def _copy(listed: Iterable[str], root: Path) -> None:
    """Programs and what they need; settings are not taken from packages."""
    paths = {_really(path) for path in listed if path.startswith(_TOP)}
    for place in ("/usr/bin", "/usr/sbin"):  # links that belong to no package
        with os.scandir(place) as entries:
            paths |= {entry.path for entry in entries if entry.is_symlink() and _alternative(entry.path)}
    names = sorted(path[1:] for path in paths if os.path.lexists(path) and not _LEFT_OUT.search(path + "/"))
    pack = ["tar", "-C", "/", "--no-recursion", "--null", "-T", "-", "-c"]
    packed = subprocess.run(pack, input="\0".join(names).encode(), capture_output=True, check=False)
    unpacked = subprocess.run(["tar", "-C", str(root), "-x"], input=packed.stdout, capture_output=True, check=False)
    if packed.returncode or unpacked.returncode:
        said = (packed.stderr + unpacked.stderr).decode(errors="replace").strip()[-300:]
        raise ImageError(f"the image 'host' was not packed: tar said {said}")


def _alternative(path: str) -> bool:
    return os.readlink(path).startswith("/etc/alternatives/")


def _really(path: str) -> str:
    """The path with links among its folders followed."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ImageError("the image 'host' of machines needs a host with dpkg: import another image") from error
    if done.returncode != 0:
        raise ImageError(f"the image 'host' was not packed: {command[0]} said {done.stderr.strip()[-300:]}")
    return done.stdout
