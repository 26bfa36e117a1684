"""Runs that are killed, ended, spiking or out of disk."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.base.errors import CheckpointError, ConfigError, RunError, SaveError
from abyssal.train import checkpoint
from abyssal.train.run import METRICS, run
from tests.faults import ROOT, largest_file
from tests.train.tiny import RULES, SAVE_EVERY, STEPS, trainer

KILLS = int(os.environ.get("ABYSSAL_KILLS", "3"))  # each costs the start of a process
BITS = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "index_loss", "grad_norm", "param_norm")
SHORT = replace(RULES, schedule=replace(RULES.schedule, steps=6))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def bits(folder: Path) -> list[list[float]]:
    return [[line[name] for name in BITS] for line in lines(folder)]


def program(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.tiny", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def same_bits(a: Path, b: Path) -> bool:
    names = checkpoint.MODEL, checkpoint.OPTIM
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_finished_run_that_goes_on_removes_what_is_too_old(tmp_path: Path) -> None:
    """As when it was killed between naming the last checkpoint and removing the third last."""
    assert run(trainer(), tmp_path, every=SAVE_EVERY)
    kept = sorted(path.name for path in tmp_path.glob("step_*"))
    shutil.copytree(tmp_path / kept[0], tmp_path / "step_00000001")
    assert run(trainer(), tmp_path, every=SAVE_EVERY)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == kept


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL at random steps, also while a checkpoint is being written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with program(whole) as process:
        assert len(process.communicate()[0].splitlines()) == STEPS
        assert process.returncode == 0
    rng = random.Random(0)
    done = 0
    for _ in range(KILLS):
        with program(killed) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 2 + STEPS // KILLS)):
                if not process.stdout.readline():
                    break
                done += 1
            time.sleep(rng.uniform(0.0, 0.06))  # a step and a save take about so long
            process.send_signal(signal.SIGKILL)
    with program(killed) as process:
        done += len(process.communicate()[0].splitlines())
        assert process.returncode == 0
    assert done > STEPS  # some steps ran again
    last = checkpoint.latest(whole)
    assert last is not None and checkpoint.latest(killed) == killed / last.name
    assert same_bits(last, killed / last.name)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert bits(killed) == bits(whole) and [line["step"] for line in lines(whole)] == list(range(1, STEPS + 1))


def test_sigterm_finishes_the_step_saves_and_ends_well(tmp_path: Path) -> None:
    with program(tmp_path) as process:
        assert process.stdout is not None
        for _ in range(SAVE_EVERY + 1):
            process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 0
    last = checkpoint.latest(tmp_path)
    assert last is not None
    step = checkpoint.load(last).state["step"]
    assert SAVE_EVERY < step < STEPS and lines(tmp_path)[-1]["step"] == step


def test_a_torn_line_and_lines_of_lost_steps_are_dropped(tmp_path: Path) -> None:
    tiny = trainer(SHORT)
    assert run(tiny, tmp_path, every=2)
    expected = bits(tmp_path)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 7}\n{"ste')
    assert run(trainer(SHORT), tmp_path)
    assert bits(tmp_path) == expected
    (tmp_path / METRICS).write_text('{"step": 2}\n')
    with pytest.raises(CheckpointError, match="no line of step 6"):
        run(trainer(SHORT), tmp_path)


def test_a_spike_goes_back_and_anticipates_then_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = trainer(SHORT)
    seen: list[dict[str, Any]] = []

    def spike(line: dict[str, Any]) -> None:
        """Before step 5, the bar falls so low that any loss is a spike; only once."""
        seen.append(line)
        if line["step"] == 4 and len(seen) == 4:
            tiny.spikes.losses, tiny.spikes.far = [0.1] * 200, 2

    assert run(tiny, tmp_path, every=3, show=spike, anticipation=2)
    assert [line["step"] for line in seen] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert [line["verdict"] for line in seen] == ["apply"] * 4 + ["roll back"] + ["apply"] * 3
    assert seen[3]["loss"] == seen[5]["loss"]  # the same place in data and weights
    assert ["ahead" in line["seconds"] for line in seen] == [False] * 5 + [True, False, False]
    assert len(lines(tmp_path)) == 8  # the spike stays on record

    again = trainer(SHORT)

    def always(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            again.spikes.losses, again.spikes.far = [0.1] * 200, 2

    with pytest.raises(RunError, match="again at step 5"):
        run(again, tmp_path / "b", every=3, show=always)


def test_a_batch_that_is_not_finite_ends_no_run(tmp_path: Path) -> None:
    """Its step is skipped; the run goes on to finite weights."""
    tiny = trainer(SHORT)
    calls = iter(range(100))
    tiny.model.embed.register_forward_hook(lambda module, ids, out: out * (math.nan if next(calls) == 8 else 1.0))
    assert run(tiny, tmp_path)
    verdicts = [line["verdict"] for line in lines(tmp_path)]
    assert verdicts.count("skip") == 1 and verdicts.count("apply") == 5
    assert all(bool(p.isfinite().all()) for p in tiny.model.parameters())


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    tiny = trainer(SHORT)
    run(tiny, tmp_path, every=2)
    last = checkpoint.latest(tmp_path)
    longer = trainer(SHORT)
    with pytest.raises(SaveError), largest_file(10_000):
        run(longer, tmp_path / "other")
    assert checkpoint.latest(tmp_path / "other") is None
    assert last is not None and torch.isfinite(checkpoint.load(last).model["embed.weight"]).all()


def test_a_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run(trainer(SHORT), tmp_path)
    with pytest.raises(ConfigError, match="clip"):
        run(trainer(replace(SHORT, clip=2.0)), tmp_path)
