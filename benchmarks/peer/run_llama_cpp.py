"""llama.cpp through the bindings of llama-cpp-python; run under the interpreter that has them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import llama_cpp
import numpy as np
from numpy.typing import NDArray

BATCH = 2048  # the default of its tools; computed in pieces of n_ubatch, 512 by default


class LlamaCpp:
    """Its model and one context; the memory is emptied before each prompt."""

    def __init__(self, file: Path, longest: int):
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        wanted.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # not mapped: some weights are stored in another order
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), wanted)
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx = -(-longest // 256) * 256
        asked.n_batch = BATCH
        asked.n_threads = asked.n_threads_batch = common.THREADS
        self.context = llama_cpp.llama_init_from_model(self.model, asked)
        if self.context is None:
            raise SystemExit("llama.cpp made no context: its own message is above")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        description = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.model, description, len(description))
        self.about: dict[str, Any] = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "weights": f"MXFP4 experts, Q8_0 for FP8, bfloat16 ({description.value.decode()})",
            "activations": "float32, Q8_0 in products",
            "cache": "float16",
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "chunk": asked.n_ubatch,
        }

    def _logits(self, tokens: list[int]) -> NDArray[np.float32]:
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)  # the batch points into it
            batch = llama_cpp.llama_batch_get_one(array, len(part))
            if code := llama_cpp.llama_decode(self.context, batch):
                raise SystemExit(f"llama_decode returned {code}")
        row = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(row, (self.vocabulary,))

    def logprobs(self, prompt: list[int]) -> NDArray[np.float32]:
        """See `common.Side`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        return common.log_softmax(self._logits(prompt))

    def answer(self, prompt: list[int], count: int) -> Iterator[int]:
        """See `common.Side`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = prompt
        for _ in range(count):
            tokens = [int(self._logits(tokens).argmax())]
            yield tokens[0]


if __name__ == "__main__":
    common.run(LlamaCpp)
