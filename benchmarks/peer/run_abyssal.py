"""Our engine: packed FP4 and FP8 weights, float32 activations, exact numerics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))
from abyssal.checkpoint.load import load_model
from abyssal.engine.engine import Engine
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampling
from abyssal.kernels.choice import choice


class Abyssal:
    """One request at a time; no reuse of prompts."""

    def __init__(self, folder: Path, longest: int):
        self.engine = Engine(load_model(folder, keep_stored=True), budget=1 << 30, slots=2)
        self.about: dict[str, Any] = {
            "weights": "FP4 and FP8 as stored, others expanded to float32",
            "activations": "float32",
            "kernels": choice().name,
            "chunk": self.engine.step_tokens,
        }

    def logprobs(self, prompt: list[int]) -> NDArray[np.float32]:
        """See `common.Side`."""
        with torch.inference_mode():
            return common.log_softmax(self.engine.model(torch.tensor([prompt]))[0, -1].numpy())

    def answer(self, prompt: list[int], count: int) -> Iterator[int]:
        """See `common.Side`."""
        request = Request(prompt=tuple(prompt), max_tokens=count, sampling=Sampling(temperature=0))
        for event in self.engine.stream(request)[1]:
            assert event.token is not None, event.error
            yield event.token


if __name__ == "__main__":
    torch.set_num_threads(common.THREADS)
    common.run(Abyssal)
