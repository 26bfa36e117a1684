"""vLLM's CPU build; run under its own interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose memory is measured
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(common.THREADS),
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams


class Vllm:
    """Its engine, stepped by hand; no reuse of prompts."""

    def __init__(self, folder: Path, longest: int):
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                skip_tokenizer_init=True,
                max_model_len=longest,
                max_num_seqs=1,
                max_logprobs=-1,
                enable_prefix_caching=False,
                dtype="bfloat16",
            )
        )
        self.number = 0
        self.about = {"version": vllm.__version__, "weights": "FP4 and FP8 as stored", "activations": "bfloat16"}

    def _outputs(self, prompt: list[int], sampling: SamplingParams) -> Iterator[vllm.RequestOutput]:
        self.number += 1
        self.engine.add_request(str(self.number), {"prompt_token_ids": prompt}, sampling)
        while self.engine.has_unfinished_requests():
            yield from self.engine.step()

    def logprobs(self, prompt: list[int]) -> NDArray[np.float32]:
        """See `common.Side`."""
        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
        *_, last = self._outputs(prompt, sampling)
        found = last.outputs[0].logprobs[0]
        row = np.full(max(found) + 1, -np.inf, np.float32)
        for token, entry in found.items():
            row[token] = entry.logprob
        return row

    def answer(self, prompt: list[int], count: int) -> Iterator[int]:
        """See `common.Side`."""
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for output in self._outputs(prompt, sampling):
            if output.outputs[0].token_ids:
                yield output.outputs[0].token_ids[-1]


if __name__ == "__main__":
    common.run(Vllm)
