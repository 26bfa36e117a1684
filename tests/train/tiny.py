"""A run of a few seconds that uses every part of the trainer; as a program it is there to be killed.

    python -m tests.train.tiny RUN      goes on from RUN's last checkpoint, and prints the number of each step
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from abyssal.arch.presets import preset
from abyssal.model import Transformer
from abyssal.model.init import initialise
from abyssal.train.order import Mixture, Share, Source
from abyssal.train.run import run
from abyssal.train.schedule import Schedule
from abyssal.train.trainer import Rules, Trainer
from abyssal.train.world import World

STEPS = 20
SCHEDULE = Schedule(STEPS, warmup=3, decay_from=0.5, dense_until=0.4, fp4_from=0.6, fp8_from=0.8)
RULES = Rules(SCHEDULE, tokens=420, passes=2, length=128, topk=4, skip_share=0.5)
SHORT = replace(RULES, schedule=replace(SCHEDULE, steps=10))  # all stages still
SAVE_EVERY = 3


def documents(seed: int) -> list[np.ndarray]:
    """Counting with small steps, which a tiny model learns soon."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(97) + rng.integers(1, 3) * np.arange(rng.integers(20, 300))) % 97 for _ in range(30)
    ]


def trainer(rules: Rules = RULES, world: World | None = None) -> Trainer:
    config = replace(
        preset("nano"),
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128, 0),
        num_attention_heads=2,
        o_groups=2,
        head_dim=64,
        q_lora_rank=32,
        o_lora_rank=32,
        sliding_window=16,
        index_head_dim=64,
        index_n_heads=4,
        index_topk=8,
        n_routed_experts=4,
        moe_intermediate_size=32,
    )
    data = Mixture({n: Source(documents(i), i, 200) for i, n in enumerate("ab")}, {"a": Share(2), "b": Share(1)})
    return Trainer(initialise(Transformer(config), 0), data, rules, world=world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(trainer(), Path(sys.argv[1]), every=SAVE_EVERY, show=lambda line: print(line["step"], flush=True))
