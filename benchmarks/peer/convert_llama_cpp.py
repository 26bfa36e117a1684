"""llama.cpp's own `convert_hf_to_gguf.py` for a release that has no tokenizer.

    python convert_llama_cpp.py FOLDER_OF_LLAMA_CPP RELEASE --outfile FILE

Everything is left to that script but the vocabulary, of which only the size is written: its hash of known tokenizers
does not know ours, and the benchmark gives token ids.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main() -> None:
    """Convert."""
    source = sys.argv.pop(1)
    sys.path.insert(0, source)
    convert = importlib.import_module("convert_hf_to_gguf")
    model = importlib.import_module("conversion.deepseek").DeepseekV4Model

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    model.set_vocab = set_vocab
    convert.main()


if __name__ == "__main__":
    main()
