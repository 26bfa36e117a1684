"""A run: steps until the end, checkpoints on the way, and what to do about signals and spikes (training.md 3.5, 7)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abyssal.base.errors import CheckpointError, RunError
from abyssal.base.files import write_bytes
from abyssal.train import checkpoint
from abyssal.train.spikes import Verdict
from abyssal.train.trainer import ANTICIPATION, Trainer

METRICS = "metrics.jsonl"
SAVE_SECONDS = 600.0


@contextmanager
def _term() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in the main thread; elsewhere nobody can listen."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines behind the last one of `step`: their steps run again. A torn last line goes too."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    kept = 0
    if step:
        try:
            kept = max(n for n, line in enumerate(lines, 1) if json.loads(line)["step"] == step)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} has no line of step {step}, which was saved: move it away") from error
    write_bytes(path, b"".join(line + b"\n" for line in lines[:kept]))


def run(
    trainer: Trainer,
    folder: Path,
    *,
    seconds: float = SAVE_SECONDS,
    every: int | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
    anticipation: int = ANTICIPATION,
) -> bool:
    """Train from the folder's last checkpoint, or from the start, to the end of the schedule.

    The folder holds checkpoints and `metrics.jsonl`, a line for each step. After SIGTERM the step is finished,
    saved, and the run returns. After a spike it goes back to the last checkpoint and routes by anticipation.

    Args:
        trainer: at its start; a checkpoint of other rules is refused.
        folder: of the run; made if it is not there.
        seconds: between checkpoints.
        every: also after so many steps.
        show: called with each line, on the first process of the run.
        anticipation: steps of anticipatory routing after a spike.
    Returns:
        True at the end of the schedule, False after SIGTERM.
    Raises:
        ConfigError, CheckpointError: the last checkpoint is of another run, or damaged.
        SaveError: a checkpoint could not be written; the one before is whole.
        RunError: the loss spikes again at a step from which the run went back already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = trainer.world
    last = world.first(checkpoint.latest(folder))
    if last is not None:
        trainer.resume(world.load(last, trainer.saved()))
        if world.rank == 0:  # a process killed at its last moment has not removed what is too old
            checkpoint.name_latest(folder, last)
    else:  # a full disk or a forbidden folder shows now, and a first spike has somewhere to go back to
        world.save(folder, trainer.step_number, trainer.saved())
    noted = folder / METRICS if world.rank == 0 else Path(os.devnull)
    if world.rank == 0:
        _cut_metrics(noted, trainer.step_number)
    spiked, saved_at = -1, time.monotonic()
    with _term() as ended, noted.open("a", encoding="utf-8") as metrics:
        while trainer.step_number < trainer.rules.schedule.steps and not world.any(ended.is_set()):
            line = trainer.step()
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            if show is not None and world.rank == 0:
                show(line)
            if line["verdict"] == Verdict.ROLL_BACK.value:
                if line["step"] <= spiked:
                    raise RunError(f"the loss spikes again at step {line['step']}: lower the rates of the recipe")
                spiked = line["step"]
                before = world.first(checkpoint.latest(folder))
                assert before is not None
                trainer.go_back(world.load(before, trainer.saved()), anticipation)
                continue
            due = every is not None and trainer.step_number % every == 0
            if world.any(due or time.monotonic() - saved_at >= seconds):
                world.save(folder, trainer.step_number, trainer.saved())
                saved_at = time.monotonic()
        last = world.first(checkpoint.latest(folder))
        if last is None or last.name != checkpoint.name_of(trainer.step_number):
            world.save(folder, trainer.step_number, trainer.saved())
    return trainer.step_number >= trainer.rules.schedule.steps
