"""transformers, as a user opens an expanded release, in bfloat16 or float32.

Attention is eager, as it has no other for this model. Prompts take its default way of computing experts, tokens the
faster of that and the eager loop, found by trying.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

TRIED = 4  # tokens with each way of computing experts
CHUNK = 1024  # it holds the index scores and attention of a whole chunk at once


class Transformers:
    """Its model and cache, in the dtype of the release; prompts are read in chunks."""

    def __init__(self, folder: Path, longest: int):
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        for parameter in self.model.parameters():  # out of the mapped files, whose pages count as its memory
            parameter.data = parameter.data.clone()
        self.prefill_experts: str = self.model.config._experts_implementation
        names = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # renamed in 5.24
        self.about: dict[str, Any] = {
            "version": transformers.__version__,
            "weights": str(self.model.dtype).removeprefix("torch."),
            "activations": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "prefill_experts": self.prefill_experts,
            "chunk": CHUNK,
        }
        self.decode_experts = min((self.prefill_experts, "eager"), key=self._seconds)
        self.about["decode_experts"] = self.decode_experts

    def _seconds(self, experts: str) -> float:
        """Of the fastest of some tokens, with this way of computing experts."""
        self.decode_experts = experts
        times = [time.perf_counter() for _ in self.answer(common.prompt(16, 256), 1 + TRIED)]
        return float(np.diff(times).min())

    def _logits(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        self.model.set_experts_implementation(self.prefill_experts if len(ids) > 1 else self.decode_experts)
        with torch.inference_mode():
            for part in ids.split(CHUNK):
                out = self.model(part[None], use_cache=True, logits_to_keep=1, **{self.cache_name: cache})
        return out.logits[0, -1].float()

    def logprobs(self, prompt: list[int]) -> NDArray[np.float32]:
        """See `common.Side`."""
        return common.log_softmax(self._logits(torch.tensor(prompt), DynamicCache(config=self.model.config)).numpy())

    def answer(self, prompt: list[int], count: int) -> Iterator[int]:
        """See `common.Side`."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor(prompt)
        for _ in range(count):
            ids = self._logits(ids, cache).argmax().view(1)
            yield int(ids)


if __name__ == "__main__":
    torch.set_num_threads(common.THREADS)
    common.run(Transformers)
