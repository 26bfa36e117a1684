"""A run's last weights as a release (training.md 7)."""

from __future__ import annotations

import shutil
from pathlib import Path

from abyssal.arch.config import ModelConfig
from abyssal.arch.tensors import Layout
from abyssal.base.errors import CheckpointError
from abyssal.base.files import write_folder
from abyssal.checkpoint.save import save_model
from abyssal.train import checkpoint

TOKENIZER = "tokenizer"  # folder of a run
FILES = ("tokenizer.json", "tokenizer_config.json")


def keep_tokenizer(data: Path, run: Path) -> None:
    """Copy the tokenizer that a run's data was made with into its folder, where the export finds it.

    Raises:
        SaveError: the file system refused.
    """
    if not (run / TOKENIZER).is_dir() and (data / FILES[0]).is_file():
        with write_folder(run / TOKENIZER) as aside:
            for name in FILES:
                shutil.copyfile(data / name, aside / name)


def export(run: Path, out: Path, layout: Layout = "flash") -> str:
    """Write the last checkpoint of a run as a release.

    Args:
        run: its folder.
        out: the release; replaced as a whole, or left as it is on any failure.
        layout: flash (FP4 experts, FP8), base, bf16 or fp32.
    Returns:
        name of the checkpoint.
    Raises:
        CheckpointError: there is no whole checkpoint.
        SaveError: the file system refused.
    """
    folder = checkpoint.latest(run)
    if folder is None:
        raise CheckpointError(f"{run} has no checkpoint: give the folder of a run")
    saved = checkpoint.load(folder)
    tokenizer = run / TOKENIZER
    save_model(
        saved.model,
        ModelConfig.from_dict(saved.state["config"]),
        layout,
        out,
        files_from=tokenizer if tokenizer.is_dir() else None,
    )
    return folder.name
