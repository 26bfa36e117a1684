"""A real server process of an edge on a free port, for tests; killed as roughly as they like."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self


class Served:
    """`abyssal sandbox serve` on a home folder, with one engine.

    Args:
        home: of the edge.
        options: more of the command line.
        engine: `process` for what stands above engines; it isolates nothing.
        port: 0 for a free one.
    """

    def __init__(self, home: Path, *options: str, engine: str = "process", port: int = 0):
        self.home, self.options, self.engine, self.port = home, options, engine, port
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        program = [
            sys.executable, "-c", "from abyssal.cli.main import main; main()", "sandbox", "serve",
            "--allow-unsafe", "--engine", self.engine,
            "--home", str(self.home), "--port", str(self.port), "--log-level", "warning", *self.options,
        ]  # fmt: skip
        self._process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("listening on "), f"the server said {line!r}"
        self.port = int(line.rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self._process is not None
        os.kill(self._process.pid, number)
        code = self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self.end()
