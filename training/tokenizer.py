"""Train the small model's tokenizer and encode its corpus.

    python training/tokenizer.py --corpus DIR --out FOLDER

Reads train.txt and valid.txt of corpus.py. Writes tokenizer.json and tokenizer_config.json to FOLDER, and
train.bin / valid.bin with their document starts (.idx) beside the corpus, in the format of training.md 6.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from abyssal.encoding.literals import BOS, EOS, SPECIAL_TOKENS

VOCABULARY = 4096
SEPARATOR = "\f"
# digits one by one; words with their leading space; punctuation; runs of blank space
WORDS = r"[^\r\n\p{L}\p{P}\p{S}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train(texts: list[str]) -> Tokenizer:
    """Byte-level BPE without normalisation; the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> str:
    """Write the release's two tokenizer files; the digest of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str(pretty=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 1048576,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text_settings = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text_settings, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Tokenizer, texts: list[str], path: Path, digest: str) -> int:
    """Write BOS document EOS for each text; the number of ids."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    starts, ids = [], []
    count = 0
    for encoded in tokenizer.encode_batch(texts, add_special_tokens=False):
        starts.append(count)
        ids.append(np.array([bos, *encoded.ids, eos], dtype="<u2"))
        count += len(ids[-1])
    header = struct.pack("<8s4sQ32s", b"DSV4TOK1", b"u16\0", count, bytes.fromhex(digest)).ljust(64, b"\0")
    path.write_bytes(header + np.concatenate(ids).tobytes())
    path.with_suffix(".idx").write_bytes(np.array(starts, dtype="<u8").tobytes())
    return count


def main() -> None:
    """Train, save, encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    parts = {
        name: (args.corpus / f"{name}.txt").read_text(encoding="utf-8").split(SEPARATOR) for name in ("train", "valid")
    }
    tokenizer = train(parts["train"])
    digest = save(tokenizer, args.out)
    for name, texts in parts.items():
        count = encode(tokenizer, texts, args.corpus / f"{name}.bin", digest)
        size = sum(len(t.encode()) for t in texts)
        print(f"{name}: {count} tokens, {size / count:.2f} bytes a token")


if __name__ == "__main__":
    main()
