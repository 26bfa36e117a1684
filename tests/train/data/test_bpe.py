"""The tokenizer: V4's marks, digits one by one, nothing lost, the same every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from abyssal.base.errors import DataError
from abyssal.encoding.literals import BOS, EOS, SPECIAL_TOKENS
from abyssal.encoding.tokenizer import Piece
from abyssal.encoding.tokenizer import Tokenizer as Serving
from abyssal.train.data.bpe import load_tokenizer, save_tokenizer, tokenised, tokenised_passage, train_bpe
from abyssal.train.data.corpora import DEFAULT, documents_of
from abyssal.train.data.example import Passage
from abyssal.train.data.mixture import Mixture
from abyssal.train.data.token_file import TokenFile, write_token_file

SIZE = 700
HARD = ["", " ", "x = 1234567\n\n\tif a:\n", "é ü 日本語 👍🏽", "".join(map(chr, range(256))), "a" * 500, BOS + EOS]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in documents_of(DEFAULT[0])]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_bpe(texts, SIZE), path)
    return path


def test_special_tokens_take_the_first_ids(folder: Path) -> None:
    serving = Serving(folder)
    assert [serving.special(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert serving.vocab_size == SIZE
    assert serving.encode_pieces([Piece(EOS, special=True)]) == [1]


def test_digits_stand_alone(folder: Path) -> None:
    tokenizer, _ = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    assert not [t for t in vocabulary if sum(c.isdigit() for c in t) > 0 and len(t) > 1]
    assert tokenizer.encode("1234567", add_special_tokens=False).tokens == list("1234567")


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_nothing_is_lost_and_typed_marks_are_text(folder: Path, text: str) -> None:
    tokenizer, _ = load_tokenizer(folder)
    (ids,) = tokenised(tokenizer, [text])
    assert (ids[0], ids[-1]) == (0, 1)
    assert not set(ids[1:-1].tolist()) & set(range(len(SPECIAL_TOKENS)))
    assert Serving(folder).decode(ids[1:-1].tolist()) == text
    assert Serving(folder).encode(text) == ids[1:-1].tolist()


def test_merges_shorten_text(folder: Path, texts: list[str]) -> None:
    tokenizer, _ = load_tokenizer(folder)
    count = sum(len(ids) - 2 for ids in tokenised(tokenizer, texts[:10]))
    assert sum(len(t.encode()) for t in texts[:10]) / count > 2


def test_it_is_the_same_every_time(folder: Path) -> None:
    """In another process, with another hash seed and without threads."""
    script = (
        "import sys; from abyssal.train.data.bpe import *; from abyssal.train.data.corpora import *;"
        f"print(save_tokenizer(train_bpe([d.text for d in documents_of(DEFAULT[0])], {SIZE}), sys.argv[1]))"
    )
    environment = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    other = folder / "other"
    command = [sys.executable, "-c", script, str(other)]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert (other / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert run.stdout.strip() == load_tokenizer(folder)[1]


def test_corpus_to_token_file(folder: Path, texts: list[str], tmp_path: Path) -> None:
    tokenizer, digest = load_tokenizer(folder)
    path = tmp_path / "topics"
    write_token_file(
        path, tokenised(tokenizer, texts), vocab_size=SIZE, tokenizer_sha256=digest, manifest={"licence": "PSF-2.0"}
    )
    file = TokenFile(path, digest)
    assert len(file) == len(texts)
    assert Serving(folder).decode(file[5][1:-1].tolist()) == texts[5]


@pytest.mark.parametrize("domain", ["retrieval", "copying"])
def test_answers_of_passages_as_tokens(folder: Path, domain: str) -> None:
    tokenizer, _ = load_tokenizer(folder)
    serving = Serving(folder)
    mixture = Mixture(lambda text: len(serving.encode(text)), {domain: 1}, lengths=(200, 400))
    for index in range(20):
        passage = mixture.passage(index)
        ids, inside = tokenised_passage(tokenizer, passage)
        assert serving.decode(ids[1:-1].tolist()) == passage.text
        assert not inside[0] and not inside[-1]
        got = "".join(serving.decode([token]) for token in ids[inside].tolist())
        wanted = "".join(passage.text[start:end] for start, end in passage.answers)
        assert got.replace(" ", "") == wanted.replace(" ", "")


def test_offsets_count_characters_not_bytes(folder: Path) -> None:
    tokenizer, _ = load_tokenizer(folder)
    ids, inside = tokenised_passage(tokenizer, Passage("é 日本 = 42, ü 17", ((7, 9), (13, 15)), "x"))
    assert Serving(folder).decode(ids[inside].tolist()) == "4217"
    ids, inside = tokenised_passage(tokenizer, Passage("", (), "x"))
    assert ids.tolist() == [0, 1] and not inside.any()


def test_too_small_a_vocabulary_and_too_little_text() -> None:
    with pytest.raises(DataError, match="no room"):
        train_bpe(["some text"], 256)
    with pytest.raises(DataError, match="train on more text"):
        train_bpe(["some text"], 400)


def test_a_folder_without_a_good_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["added_tokens"] = layout["added_tokens"][1:]
    layout["model"]["vocab"].pop(BOS)
    layout["model"]["vocab"]["<other>"] = 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    with pytest.raises(DataError, match="no marks"):
        load_tokenizer(tmp_path)
