"""An edge's home folder: it belongs to one process at a time, and has a name and a key that outlive each of them."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from abyssal.base.files import write_bytes
from abyssal.sandbox.errors import Rejected


class Home:
    """The folder, from now on ours.

    Args:
        folder: is there.
        name: id for the edge of a new folder; None for a random one.
    Attributes:
        id: of the edge, the first part of its sandboxes' ids.
        key: for tags of secrets, and for tokens.
    Raises:
        Rejected: another edge runs on it.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        self._lock = _lock(folder / "lock")
        self.id = _once(folder / "edge.id", lambda: (name or secrets.token_hex(4)).encode()).decode()
        self.key = _once(folder / "log.key", lambda: secrets.token_bytes(32))

    def keep_head(self, sandbox: str, head: str) -> None:
        """Write down the last hash of a log that is closed for good."""
        with open(self.folder / "heads.jsonl", "a", encoding="ascii") as file:
            file.write(json.dumps({"sandbox": sandbox, "head": head}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Let another edge have it."""
        os.close(self._lock)


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise Rejected(f"another edge runs on {path.parent}: speak to it, or take another folder") from None
    return handle


def _once(path: Path, make: Callable[[], bytes]) -> bytes:
    """What a file holds, made if missing."""
    if not path.exists():
        write_bytes(path, make())
        path.chmod(0o600)
    return path.read_bytes()
