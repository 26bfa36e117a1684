"""Tiny releases of every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abyssal.arch.config import ModelConfig
from abyssal.arch.presets import preset
from abyssal.arch.tensors import LAYOUTS
from abyssal.checkpoint.save import make_release


def tiny_config(layout: str) -> ModelConfig:
    """All layer kinds; some matrices are no multiple of an FP8 tile."""
    config = replace(
        preset("nano"),
        vocab_size=150,
        hidden_size=64,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128, 0),
        n_routed_experts=4,
        moe_intermediate_size=96,
        index_topk=4,
    )
    if layout == "0731":
        spark = replace(preset("flash-0731").dspark, target_layer_ids=(0, 1, 2), markov_rank=16)  # type: ignore[type-var]
        config = replace(config, dspark=spark, compress_ratios=(0, 4, 128, 0, 0, 0))
    return config


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """layout -> folder; read only."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp("releases") / layout
        make_release(tiny_config(layout), 1, layout, folders[layout], shard_bytes=200_000)
    return folders
