"""Pairs of ids that no training sequence held, looked up at any length (training.md 8.3): without text or engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from abyssal.model import Transformer
from abyssal.model.recorder import Recorder
from abyssal.train.data.pairs import MOST, Pairs
from abyssal.train.skills.rates import rate_of

CHUNK = 1024  # tokens that are read at once
HELD_OUT = 1 << 40  # numbers of training sequences stay far below


class Dense(Recorder):
    """Every query of a CSA layer reads every block.

    Args:
        length: tokens of the longest sequence.
    """

    def __init__(self, length: int):
        self.topk = length


def look_up(
    model: Transformer, pairs: Pairs, length: int, items: int, recorder: Recorder | None = None
) -> dict[str, Any]:
    """Ask for values behind repeated keys.

    Args:
        model: reads plain ids.
        pairs: what it was trained on; roles and ids count.
        length: tokens of each sequence.
        items: sequences, each with up to `MOST` pairs and as many questions.
        recorder: shown each pass.
    Returns:
        `passed`, `n`, `rate`, and `low` and `high` of its interval; `loss`, the mean surprise of the right answers.
    Raises:
        ConfigError: the pairs do not fit into the length.
    """
    pairs = replace(pairs, lengths=(length, length))
    passed: list[bool] = []
    surprise = 0.0
    for item in range(items):
        rng = np.random.default_rng((HELD_OUT, item))
        drawn, answers = pairs.sequence(rng, length, pairs.most, MOST)
        ids, asked = torch.from_numpy(drawn), torch.from_numpy(answers).nonzero().squeeze(1)
        cache = model.new_cache()
        with torch.inference_mode():
            parts = [model.run(part, [cache], recorder=recorder).z_TD for part in ids.split(CHUNK)]
            logs = model.logits(torch.cat(parts)[asked - 1]).log_softmax(-1)
        passed += (logs.argmax(-1) == ids[asked]).tolist()
        surprise -= float(logs.gather(1, ids[asked].unsqueeze(1)).double().sum())
    return {**rate_of(passed), "loss": surprise / len(passed)}
