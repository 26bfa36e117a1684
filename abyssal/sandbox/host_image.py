"""The image "host": this host's own programs, read-only, and nothing else of it.

Folders with programs are shown as they are. Of `/etc` what programs need is copied, by a list of names: a list of
secrets to leave out would never be complete. Homes, data, logs and everything that is not readable for all stay out.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from abyssal.sandbox.agent import USERS
from abyssal.sandbox.image import Image, Store

PROGRAMS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
FOLDERS = {
    **dict.fromkeys(("proc", "sys", "dev", "run", "etc", "home", "mnt", "opt", "srv", "var/lib", "var/cache"), 0o755),
    **dict.fromkeys(("tmp", "var/tmp"), 0o1777),
    "root": 0o700,
    "home/user": 0o755,
    "work": 0o755,
    "var/log": 0o755,
}
SETTINGS = (
    *("alternatives", "bash.bashrc", "profile", "inputrc", "magic", "mime.types", "protocols", "services", "shells"),
    *("ca-certificates", "ca-certificates.conf", "ssl/certs", "ssl/openssl.cnf", "ld.so.cache", "ld.so.conf"),
    *("ld.so.conf.d", "localtime", "timezone", "login.defs", "debian_version", "os-release", "lsb-release", "issue"),
    *("perl", "python3", "python3.11", "python3.12", "python3.13", "java-17-openjdk", "java-21-openjdk", "fonts"),
    *("terminfo", "gai.conf", "host.conf", "vim", "locale.alias", "locale.gen", "rpc", "ethertypes", "matplotlibrc"),
)
ACCOUNTS = {
    "passwd": "".join(
        [
            *(f"{user.name}:x:{user.uid}:{user.gid}::{user.home}:/bin/sh\n" for user in USERS.values()),
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        ]
    ),
    "group": "".join([*(f"{user.name}:x:{user.gid}:\n" for user in USERS.values()), "tty:x:5:\nnogroup:x:65534:\n"]),
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
    "resolv.conf": "",
    "machine-id": "",
}


def host_image(store: Store) -> Image:
    """The image; its one layer is packed from this host as it is now."""
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".host.") as scratch:
        root = Path(scratch) / "root"
        fill(root)
        layer = store.pack(root)
    return Image(base=(layer,), binds=programs(), architecture=platform.machine())


def programs() -> tuple[str, ...]:
    """Folders of this host that are shown as they are."""
    places = (Path("/") / name for name in PROGRAMS)
    return tuple(str(place) for place in places if place.is_dir() and not place.is_symlink())


def fill(root: Path) -> None:
    """Make a root folder for this host's programs."""
    root.mkdir(mode=0o755)
    for name in PROGRAMS:
        host = Path("/") / name
        if host.is_symlink():
            (root / name).symlink_to(os.readlink(host))
        elif host.is_dir():
            (root / name).mkdir()
    skeleton(root)
    for name in SETTINGS:
        _copy(Path("/etc") / name, root / "etc" / name)


def skeleton(root: Path, below: Sequence[Path] = ()) -> None:
    """Folders and accounts that every sandbox has; what is there already, or in layers below, stays."""
    made = []
    for name, mode in FOLDERS.items():
        if not _has(name, root, *below):
            (root / name).mkdir(parents=True)
            (root / name).chmod(mode)
            made.append(name)
    for name, text in ACCOUNTS.items():
        path = root / "etc" / name
        if not _has(f"etc/{name}", root, *below):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if os.geteuid() == 0:
        for name in {"work", "home/user"} & set(made):
            os.chown(root / name, USERS["user"].uid, USERS["user"].gid, follow_symlinks=False)


def _has(name: str, *roots: Path) -> bool:
    return any((root / name).exists() or (root / name).is_symlink() for root in roots)


def _copy(source: Path, to: Path) -> None:
    """What everybody may read; links as links."""
    if source.is_symlink():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(os.readlink(source))
    elif source.is_dir() and source.stat().st_mode & 0o005 == 0o005:
        to.mkdir(parents=True, exist_ok=True)
        for each in source.iterdir():
            _copy(each, to / each.name)
    elif source.is_file() and source.stat().st_mode & 0o004:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, to)
        to.chmod(source.stat().st_mode & 0o777)
