"""Checkpoints: what is written is read, damage is named, and a killed run ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.base.errors import CheckpointError, SaveError
from abyssal.train import checkpoint
from abyssal.train.checkpoint import Saved
from tests.faults import ROOT, largest_file
from tests.train.tiny import STEPS, trainer

KILLS = int(os.environ.get("ABYSSAL_KILLS", "3"))  # each costs the start of a process


def little(value: float = 1.0) -> Saved:
    return Saved({"w": torch.full((300,), value)}, {"w.momentum": torch.ones(2, 3).T}, {"step": 3, "data": {"a": 1}})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    folder = checkpoint.save(tmp_path, 3, little())
    assert folder.name == "step_00000003" and checkpoint.latest(tmp_path) == folder
    found = checkpoint.load(folder)
    assert torch.equal(found.model["w"], torch.ones(300)) and found.optim["w.momentum"].shape == (3, 2)
    assert found.state["step"] == 3 and found.state["data"] == {"a": 1}
    assert found.state["made_with"]["torch"] == torch.__version__
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "optim.safetensors", "state.json"]


def test_the_last_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        checkpoint.save(tmp_path, step, little())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010", "step_00000100"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, little())
    folder = checkpoint.save(tmp_path, 1, little(2.0))
    assert torch.equal(checkpoint.load(folder).model["w"], torch.full((300,), 2.0))


@pytest.mark.parametrize("size", [100, 1000])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, size: int) -> None:
    folder = checkpoint.save(tmp_path, 1, little())
    with pytest.raises(SaveError), largest_file(size):
        checkpoint.save(tmp_path, 2, little(2.0))
    assert checkpoint.latest(tmp_path) == folder
    assert torch.equal(checkpoint.load(folder).model["w"], torch.ones(300))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = checkpoint.save(tmp_path, 1, little())
    path = folder / name
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[-9 if name != "state.json" else 0] ^= 1
        path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="step_00000001"):
        checkpoint.load(folder)


def test_latest_must_name_a_checkpoint(tmp_path: Path) -> None:
    for text in ("step_00000009\n", "\n"):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            checkpoint.latest(tmp_path)


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rindex("\n")].split("\n")]


def program(run: Path, steps: int = STEPS) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.tiny", str(run), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def same_bits(a: Path, b: Path) -> bool:
    names = checkpoint.MODEL, checkpoint.OPTIM
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL at random steps, also while a checkpoint is being written; steps that run twice repeat themselves."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    with program(whole) as process:
        process.communicate()
        assert process.returncode == 0
    rng = random.Random(0)
    for _ in range(KILLS):
        with program(killed) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(1, 2 + STEPS // KILLS)):
                if not process.stdout.readline():
                    break
            time.sleep(rng.uniform(0.0, 0.06))  # a step and a save take about so long
            process.send_signal(signal.SIGKILL)
    with program(killed) as process:
        process.communicate()
        assert process.returncode == 0
    last = checkpoint.latest(whole)
    assert last is not None and checkpoint.latest(killed) == killed / last.name
    assert same_bits(last, killed / last.name)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    expected = {line["step"]: line for line in lines(whole)}
    assert len(lines(killed)) > STEPS  # some steps ran again
    for line in lines(killed):
        for name in ("loss", "mtp_loss", "balance_loss", "index_loss", "grad_norm", "param_norm", "tokens"):
            assert line[name] == expected[line["step"]][name], (line["step"], name)


def test_resuming_in_one_process_gives_the_same_bits(tmp_path: Path) -> None:
    first = trainer()
    for _ in range(14):
        first.step()
    checkpoint.save(tmp_path, 14, first.saved())
    expected = [first.step()["loss"] for _ in range(6)]
    second = trainer()
    folder = checkpoint.latest(tmp_path)
    assert folder is not None
    second.resume(checkpoint.load(folder))
    assert [second.step()["loss"] for _ in range(6)] == expected
