"""Token files: what is written is read, and damage is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from abyssal.base.errors import DataError, SaveError
from abyssal.train.data.token_file import TokenFile, write_token_file

DIGEST = "ab" * 32
DOCUMENTS = [[0, 5, 9, 1], [], [0, 4095, 1], list(range(100))]


def written(folder: Path, vocab_size: int = 4096) -> Path:
    path = folder / "prose"
    write_token_file(
        path,
        DOCUMENTS,
        vocab_size=vocab_size,
        tokenizer_sha256=DIGEST,
        manifest={"source": "made here", "licence": "MIT", "sha256": "00"},
    )
    return path


@pytest.mark.parametrize(("vocab_size", "dtype"), [(4096, np.uint16), (65536, np.uint16), (129280, np.uint32)])
def test_documents_come_back(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    path = written(tmp_path, vocab_size)
    for name in ("prose", "prose.bin", "prose.idx", "prose.json"):
        file = TokenFile(tmp_path / name, DIGEST)
        assert [document.tolist() for document in (file[i] for i in range(len(file)))] == DOCUMENTS
        assert file[0].dtype == dtype and file.ids.dtype == dtype
    assert file.manifest["licence"] == "MIT"
    assert (file.manifest["documents"], file.manifest["tokens"]) == (4, 107)
    file.verify()
    assert sorted(p.name for p in path.parent.iterdir()) == ["prose.bin", "prose.idx", "prose.json"]
    with pytest.raises(IndexError):
        file[4]
    with pytest.raises(ValueError, match="read-only"):
        file[0][0] = 3


def test_the_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    data = written(tmp_path).with_suffix(".bin").read_bytes()
    assert data[:24] == b"DSV4TOK1u16\0" + struct.pack("<Q", 107) + bytes.fromhex(DIGEST)[:4]
    assert data[20:52] == bytes.fromhex(DIGEST) and data[52:64] == bytes(12)
    assert data[64:72] == struct.pack("<4H", 0, 5, 9, 1)
    assert (tmp_path / "prose.idx").read_bytes() == struct.pack("<4Q", 0, 4, 4, 7)


def test_an_empty_file(tmp_path: Path) -> None:
    write_token_file(tmp_path / "none", [], vocab_size=10, tokenizer_sha256=DIGEST, manifest={})
    assert len(TokenFile(tmp_path / "none")) == 0


@pytest.mark.parametrize("file", ["prose.bin", "prose.idx", "prose.json"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    written(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=f"{file} does not exist"):
        TokenFile(tmp_path / "prose")


@pytest.mark.parametrize(("file", "left"), [("prose.bin", 10), ("prose.bin", 65), ("prose.bin", -1), ("prose.idx", 8)])
def test_a_file_that_was_cut_off(tmp_path: Path, file: str, left: int) -> None:
    written(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DataError, match="cut off" if left != 10 else "does not begin with"):
        TokenFile(tmp_path / "prose")


def damaged(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "at", "new", "message"),
    [
        ("prose.bin", 0, b"DSV4TOK2", "does not begin with"),
        ("prose.bin", 8, b"f16", "unknown type"),
        ("prose.idx", 8, struct.pack("<Q", 200), "does not rise"),
        ("prose.idx", 0, struct.pack("<Q", 1), "does not rise"),
        ("prose.json", 0, b"[", "no manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, file: str, at: int, new: bytes, message: str) -> None:
    written(tmp_path)
    damaged(tmp_path / file, at, new)
    with pytest.raises(DataError, match=message):
        TokenFile(tmp_path / "prose")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer abab"):
        TokenFile(written(tmp_path), "cd" * 32)


def test_a_changed_id_is_found_by_verify(tmp_path: Path) -> None:
    damaged(written(tmp_path).with_suffix(".bin"), 70, b"\7")
    file = TokenFile(tmp_path / "prose")
    with pytest.raises(DataError, match="has changed"):
        file.verify()


def test_a_manifest_of_another_set_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "prose.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 106}))
    with pytest.raises(DataError, match="manifest says 106"):
        TokenFile(tmp_path / "prose")


@pytest.mark.parametrize("bad", [-1, 4096])
def test_an_interrupted_write_leaves_nothing_that_can_be_read(tmp_path: Path, bad: int) -> None:
    """An id out of range, or any other failure between the documents."""
    written(tmp_path)
    with pytest.raises(DataError, match="document 1 has an id outside"):
        write_token_file(tmp_path / "prose", [[1], [bad]], vocab_size=4096, tokenizer_sha256=DIGEST, manifest={})
    with pytest.raises(DataError, match="does not exist"):
        TokenFile(tmp_path / "prose")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SaveError):
        write_token_file(tmp_path / "no" / "prose", [], vocab_size=9, tokenizer_sha256=DIGEST, manifest={})
