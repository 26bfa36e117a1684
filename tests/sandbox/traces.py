"""What a box has on this host: mounts, loop devices, control groups, processes, files."""

from __future__ import annotations

import os
from pathlib import Path

from abyssal.sandbox.engines.bundle import RUN

GROUPS = Path("/sys/fs/cgroup")


def named(root: Path, name: str) -> list[str]:
    """Files and folders whose names begin so; others may come and go meanwhile."""
    return [
        os.path.join(folder, entry)
        for folder, folders, files in os.walk(root)
        for entry in (*folders, *files)
        if entry.startswith(name)
    ]


def traces(box_id: str) -> list[str]:
    """All that names it."""
    mounted = Path("/proc/self/mountinfo").read_text().splitlines()
    found = [line for line in mounted if box_id in line]
    found += [path for root in (GROUPS, RUN) for path in named(root, box_id)]
    loops = Path("/sys/block").glob("loop*/loop/backing_file")
    found += [text for text in map(_text, loops) if box_id in text]
    programs = Path("/proc").glob("[0-9]*/cmdline")
    return found + [f"process {path.parent.name}" for path in programs if box_id in _text(path)]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # gone meanwhile
        return ""
