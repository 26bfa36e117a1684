"""The whole way from packages to token files, on a small corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from abyssal.base.errors import DataError
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.train.data.corpora import DEFAULT, Source, read_corpus
from abyssal.train.data.mixture import Mixture
from abyssal.train.data.prepare import plain_text, prepare
from abyssal.train.data.token_file import TokenFile

SOURCES = (DEFAULT[0], Source("python", "PSF-2.0", "python", "code", "code", "[a-e]*.py"))
SIZE = 1000


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared")
    prepare(path, SOURCES, vocab_size=SIZE, examples=50)
    return path


@pytest.mark.parametrize("name", ["prose", "prose.held_out", "code", "code.held_out"])
def test_token_files_hold_the_corpus(out: Path, name: str) -> None:
    kind, _, held_out = name.partition(".")
    texts = list(read_corpus(out / "corpus", kind, held_out=bool(held_out)))  # type: ignore[arg-type]
    file = TokenFile(out / f"{name}.bin")
    file.verify()
    tokenizer = Tokenizer(out)
    assert [tokenizer.decode(file[i][1:-1].tolist()) for i in range(len(file))] == texts
    assert file.manifest["licence"] == ["PSF-2.0"]
    assert file.manifest["bytes"] == sum(len(text.encode()) for text in texts)


def test_held_out_parts_are_not_empty(out: Path) -> None:
    assert len(TokenFile(out / "prose.held_out.bin")) and len(TokenFile(out / "code.held_out.bin"))


def test_the_tokenizer_knows_generated_text(out: Path, tmp_path: Path) -> None:
    """A tokenizer that has seen no examples needs more tokens for new ones."""
    prepare(tmp_path, SOURCES, vocab_size=SIZE, examples=0)
    texts = [plain_text(example) for example in Mixture(lambda t: len(t.split()), seed=1).examples(40)]
    seen, unseen = (sum(len(Tokenizer(folder).encode(text)) for text in texts) for folder in (out, tmp_path))
    assert seen < 0.97 * unseen


def test_nothing_is_made_without_enough_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train on more text"):
        prepare(tmp_path, SOURCES[:1], vocab_size=60_000, examples=0)
    assert not (tmp_path / "prose.bin").exists()
