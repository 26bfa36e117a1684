"""Where this package keeps what it has made on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """ABYSSAL_HOME, else a folder in the platform's cache folder."""
    given = os.environ.get("ABYSSAL_HOME")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "abyssal"
