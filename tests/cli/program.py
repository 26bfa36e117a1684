"""The real program, begun as forks of a process that has read its modules: seconds less for each command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PARENT = """
import json, os, sys
import torch, abyssal.cli.main, abyssal.engine.engine, abyssal.train.recipe
for line in sys.stdin:
    arguments, cwd, env, out, err = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for descriptor, path in enumerate((os.devnull, out, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv = ["abyssal", *arguments]
        sys.exit(abyssal.cli.main.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _parent() -> subprocess.Popen[str]:
    """Ends when its standard input does, with us."""
    return subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def abyssal(
    *arguments: str | Path, code: int = 0, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must have this code; bad input must be told in one line."""
    parent = _parent()
    assert parent.stdin is not None and parent.stdout is not None
    told = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = [told, str(cwd or Path.cwd()), dict(os.environ if env is None else env), str(out), str(err)]
        parent.stdin.write(json.dumps(job) + "\n")
        parent.stdin.flush()
        ended = int(parent.stdout.readline())
        result = subprocess.CompletedProcess(told, ended, out.read_text(), err.read_text())
    assert result.returncode == code, result.stdout + result.stderr
    if code == 2 and "Usage" not in result.stderr:
        assert result.stderr.startswith("abyssal: ") and result.stderr.count("\n") == 1, result.stderr
        assert not result.stdout
    return result
