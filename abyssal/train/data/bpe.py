"""Train a byte-level BPE with V4's special tokens, and tokenise documents with it (training.md 6, 8.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from abyssal.base.errors import DataError
from abyssal.base.files import sha256_of, write_bytes, write_json
from abyssal.encoding.literals import BOS, EOS, SPECIAL_TOKENS
from abyssal.train.data.example import Passage

VOCABULARY = 4096
BATCH = 256  # documents that are tokenised together
# digits one by one; words with their leading space; punctuation; runs of blank space
WORDS = r"[^\r\n\p{L}\p{P}\p{S}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterable[str], vocab_size: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE without normalisation; the special tokens take the first ids.

    The same texts in the same order give the same tokenizer, with any number of threads.

    Args:
        texts: what to learn merges from.
        vocab_size: ids in all, special tokens and the 256 bytes included.
    Raises:
        DataError: the texts do not hold enough different words for so many ids.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise DataError(f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(SPECIAL_TOKENS)} marks")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(f"the texts give {got} ids, not {vocab_size}: train on more text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str) -> str:
    """Write tokenizer.json and tokenizer_config.json of a release; the digest of the first.

    Raises:
        SaveError: the file system refused.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = tokenizer.to_str(pretty=False).encode()
    write_bytes(folder / "tokenizer.json", data)
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
    write_json(folder / "tokenizer_config.json", settings)
    return hashlib.sha256(data).hexdigest()


def load_tokenizer(folder: Path | str) -> tuple[Tokenizer, str]:
    """A release's tokenizer for plain documents, and its digest; special tokens in their text stay text.

    Raises:
        DataError: there is none, or it has no begin and end marks.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist: train a tokenizer first")
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
        for token in layout["added_tokens"]:  # as the serving tokenizer does
            token["special"] = True
        tokenizer = Tokenizer.from_str(json.dumps(layout))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer ({error}): train it again") from None
    if tokenizer.token_to_id(BOS) is None or tokenizer.token_to_id(EOS) is None:
        raise DataError(f"{path} has no marks {BOS} and {EOS}: take one of a V4 release")
    tokenizer.encode_special_tokens = True
    return tokenizer, sha256_of(path)


def tokenised(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[NDArray[np.int64]]:
    """Ids of each document, between the marks of begin and end."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([bos, *encoded.ids, eos], dtype=np.int64)


def tokenised_passage(tokenizer: Tokenizer, passage: Passage) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids of a passage between the marks, and which of them belong to its answers.

    A token that begins with the space before an answer belongs to it.
    """
    encoded = tokenizer.encode(passage.text, add_special_tokens=False)
    (ids,) = tokenised(tokenizer, [passage.text])
    starts, ends = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(ids), dtype=np.bool_)
    for start, end in passage.answers:
        inside[1:-1] |= (starts < end) & (ends > start)
    return ids, inside
