"""QEMU has no more than it needs: a user of its own, empty namespaces, nothing of the file system but programs.

A guest that breaks out of QEMU finds itself as a user that owns nothing, without network, other processes or
capabilities, and with a seccomp filter that QEMU set on itself (sandbox.md 3, rule 5).
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Sequence

from abyssal.sandbox.errors import Unsupported
from abyssal.sandbox.vm.accel import DEVICE, usable_group

_FIRST_USER = 1_800_000_000  # above all that accounts and containers of common hosts use
_USERS = 1 << 24
_SHOWN = ("lib", "lib64", "bin", "sbin")


def user_of(box_id: str) -> int:
    """The user id of a sandbox's QEMU."""
    return _FIRST_USER + zlib.crc32(box_id.encode()) % _USERS


def confined(box_id: str, command: Sequence[str], *, kvm: bool = False) -> list[str]:
    """The command within its bounds. It waits for a line on its standard input, so that limits are set before.

    Args:
        box_id: whose it is.
        command: of QEMU.
        kvm: whether it needs /dev/kvm.
    Raises:
        Unsupported: bubblewrap is missing.
    """
    if shutil.which("bwrap") is None:
        raise Unsupported("virtual machines need bubblewrap around QEMU: run `apt-get install bubblewrap`")
    words = ["/bin/sh", "-c", 'read -r _; exec "$@" < /dev/null', "sh"]
    if os.geteuid() == 0:
        user = str(user_of(box_id))
        words += ["setpriv", "--reuid", user, "--regid", user, "--no-new-privs"]
        words += [f"--groups={usable_group()}"] if kvm else ["--clear-groups"]
    words += ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    words += ["--dev-bind", str(DEVICE), str(DEVICE)] if kvm else []
    for name in _SHOWN:
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    return [*words, "--remount-ro", "/", "--", *command]
