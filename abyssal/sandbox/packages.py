"""What engines need of the host: Debian packages, which of them are missing, and how to get them (sandbox.md 3)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from abyssal.sandbox.errors import Unsupported

_AGENT = ("gcc", "libc6-dev")  # the guest's agent is compiled here
_ROOT = (*_AGENT, "e2fsprogs", "erofs-utils", "util-linux")  # layers and disks
_RUNC = ("runc", *_ROOT, "libseccomp2")
_MACHINE = ("qemu-system-x86", "qemu-utils", "bubblewrap", "lz4", *_ROOT)
NEEDS: Mapping[str, Sequence[str]] = {
    "pool": (*_RUNC, "python3"),
    "runc": _RUNC,
    "bwrap": ("bubblewrap", *_AGENT, "libseccomp2", "util-linux"),
    "gvisor": ("runsc", *_ROOT),
    "qemu-microvm": _MACHINE,
    "qemu-vm": (*_MACHINE, "mtools", "syslinux", "syslinux-common"),
}


def missing(engine: str) -> list[str]:
    """Packages that an engine needs and this host has not; all of them where nobody can say."""
    needs = NEEDS.get(engine, ())
    if not needs or shutil.which("dpkg-query") is None:
        return list(needs)
    asked = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *needs]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
    there = {line.split()[0] for line in told if line.endswith(" installed")}
    return [package for package in needs if package not in there]


def remedy(engine: str) -> str:
    """A command line that gets an engine what it lacks; empty where it lacks no package."""
    packages = missing(engine)
    return f"apt-get install {' '.join(packages)}" if packages else ""


def install(engine: str) -> list[str]:
    """Install what an engine lacks.

    Returns:
        the packages.
    Raises:
        Unsupported: not root, no apt-get, or it failed; says the command to run by hand.
    """
    packages = missing(engine)
    if not packages:
        return []
    by_hand = f"run `{remedy(engine)}` as root"
    if shutil.which("apt-get") is None or shutil.which("dpkg-query") is None:
        raise Unsupported(f"packages for engine {engine} can be installed on Debian alone: elsewhere, get {packages}")
    if os.geteuid() != 0:
        raise Unsupported(f"packages for engine {engine} are installed by root: {by_hand}")
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unsupported(f"packages for engine {engine} could not be installed ({said}): {by_hand}")
    return packages


def refresh() -> None:
    """Have apt learn which packages there are; what is known already serves where that fails."""
    if shutil.which("apt-get") is not None and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "--quiet"], capture_output=True, check=False)
