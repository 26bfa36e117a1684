"""Build guest programs (the `*.c` of this folder) with the C compiler of this machine, once for each state of them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from abyssal.base.files import write_aside
from abyssal.sandbox.errors import Unsupported

SOURCES = Path(__file__).parent
AGENT = ("agent.c", "frames.c", "processes.c", "tree.c", "files.c", "streams.c", "init.c", "groups.c")
FLAGS = ("-std=gnu11", "-static", "-O2", "-Wall", "-Wextra", "-Werror")
REMEDY = "apt-get install gcc libc6-dev"


def agent(folder: Path) -> Path:
    """The agent's program, in a folder of caches, built there unless that was done before.

    Raises:
        Unsupported: there is no compiler, or it cannot link statically.
    """
    return build(folder, "agent", AGENT)


def build(folder: Path, name: str, sources: Sequence[str]) -> Path:
    """A static program from sources of this room; its name ends in a digest of them and of all headers.

    Raises:
        Unsupported: there is no compiler, or it cannot build it.
    """
    paths = [SOURCES / source for source in sources]
    program = folder / f"{name}-{_digest(tuple(paths))[:16]}"
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unsupported(f"the guest's {name} cannot be built without a C compiler: {REMEDY}")
    folder.mkdir(parents=True, exist_ok=True)
    with write_aside(program) as aside:
        command = [compiler, *FLAGS, "-o", str(aside), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unsupported(f"{compiler} cannot build the guest's {name} ({reason}): {REMEDY}")
    program.chmod(0o755)
    return program


@cache
def _digest(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [*paths, *sorted(SOURCES.glob("*.h"))]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()
