"""Checkpoints: what is written is read, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abyssal.base.errors import CheckpointError, SaveError
from abyssal.train import checkpoint
from abyssal.train.checkpoint import Saved
from tests.faults import largest_file
from tests.train.tiny import trainer


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
