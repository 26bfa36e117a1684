"""Whether this host's processor can run guests itself. Only a guest that answered proves it (sandbox.md 3, rule 1).

That `/dev/kvm` opens means little: there are hosts whose module accepts machines on which common kernels crawl or stop.
The outcome is kept until the next boot of the host.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from abyssal.base.files import write_json
from abyssal.sandbox.api import Accel
from abyssal.sandbox.errors import SandboxError

DEVICE = Path("/dev/kvm")
LIMIT = 10.0  # seconds; with a processor that helps it is less than one


@dataclass(frozen=True)
class Found:
    """How guests run here, and how we know."""

    accel: Accel
    why: str


async def found(state: Path, trial: Callable[[], Awaitable[float]]) -> Found:
    """The best way to run guests.

    Args:
        state: folder where the outcome is kept.
        trial: starts a guest with KVM and returns the seconds until it answered.
    """
    path = state / "accel.json"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if path.exists():
        kept = json.loads(path.read_text())
        if kept.pop("boot", None) == boot:
            return Found(**kept)
    outcome = await _tried(trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"boot": boot, **asdict(outcome)})
    return outcome


async def _tried(trial: Callable[[], Awaitable[float]]) -> Found:
    if not DEVICE.exists():
        return Found("tcg", "emulated: there is no /dev/kvm")
    if usable_group() is None:
        return Found(
            "tcg", "emulated: /dev/kvm is for root alone, and QEMU does not run as root (chgrp kvm, chmod 660)"
        )
    try:
        took = await trial()
    except SandboxError as error:
        return Found("tcg", f"emulated: /dev/kvm opens, but a guest did not answer: {error}")
    return Found("kvm", f"a guest with KVM answered after {took:.1f} s")


def usable_group() -> int | None:
    """The group that lets an unprivileged process use KVM; None where no group does."""
    try:
        about = DEVICE.stat()
    except OSError:
        return None
    needed = stat.S_IRGRP | stat.S_IWGRP
    if about.st_mode & needed != needed:
        return None
    return about.st_gid if os.geteuid() == 0 or about.st_gid in os.getgroups() else None
