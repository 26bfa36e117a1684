"""How fast the host's time stamp counter runs, which is also the guest's where processors are emulated.

A guest that measures it itself on a busy host gets it wrong, and then hangs at random or lives too fast; so it is told.
Measured once per boot of the host, since a machine's command line, and so its template, has it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from abyssal.base.files import write_json
from abyssal.sandbox.guest import build


def counter_khz(state: Path) -> int:
    """Thousand ticks per second.

    Raises:
        Unsupported: there is no compiler for the program that measures.
    """
    path = state / "clock.json"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["boot"] == boot:
            return int(kept["khz"])
    program = build.build(state / "programs", "clock", ["clock.c"])
    khz = int(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"boot": boot, "khz": khz})
    return khz
