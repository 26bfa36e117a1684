"""The run of `tests.train.tiny` on several processes, as a program for torchrun.

    torchrun ... -m tests.train.tiny_parallel RUN [options]

The first process prints the number of each step.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

from abyssal.train.parallel.processes import Processes
from abyssal.train.run import run
from tests.train.tiny import SAVE_EVERY, SHORT, trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--die-before", type=int, help="the last process is killed at its first start")
    parser.add_argument("--end-before", type=int, help="the last process is told to end, before this step")
    told = parser.parse_args()
    torch.set_num_threads(1)
    tiny = trainer(SHORT, Processes(told.experts))
    learn, last = tiny.step, tiny.world.rank == tiny.world.size - 1

    def step() -> dict[str, Any]:
        number = tiny.step_number + 1
        if last and number == told.die_before and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if last and number == told.end_before:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn()

    tiny.step = step  # type: ignore[method-assign]
    run(tiny, told.run, every=SAVE_EVERY, show=lambda line: print(line["step"], flush=True))
    tiny.world.end()


if __name__ == "__main__":
    main()
