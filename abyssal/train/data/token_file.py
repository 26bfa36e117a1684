"""Tokenised documents on disk: NAME.bin, NAME.idx and NAME.json (training.md 6).

NAME.bin    64 bytes of header: magic, dtype "u16" or "u32", count of ids u64, SHA-256 of tokenizer.json;
            then the ids, one document after another, little-endian
NAME.idx    where each document starts, u64
NAME.json   the manifest: what the caller says (source, licence, ...), counts, digests of the other two
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.base.errors import DataError
from abyssal.base.files import sha256_of, write_aside, write_json

MAGIC = b"DSV4TOK1"
HEADER = struct.Struct("<8s4sQ32s12x")
DTYPES: dict[str, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}


class TokenFile:
    """A memory-mapped reader; nothing is read before it is asked for.

    Args:
        path: any of the three files, or their common path without ending.
        tokenizer_sha256: of the tokenizer.json in use; None takes any.
    Attributes:
        manifest: as written.
        ids: all ids, one-dimensional, read-only.
        starts: where each document starts in `ids`, and the end of the last: documents + 1 numbers.
    Raises:
        DataError: a file is missing, cut off, of another format, or made with another tokenizer.
    """

    def __init__(self, path: Path | str, tokenizer_sha256: str | None = None):
        self.path = _stem(path)
        bin_path, idx_path, json_path = _names(self.path)
        for file in (bin_path, idx_path, json_path):
            if not file.is_file():
                raise DataError(f"{file} does not exist: build the token file {self.path} again")
        try:
            self.manifest: dict[str, Any] = json.loads(json_path.read_bytes())
            documents = int(self.manifest["documents"])
            declared = int(self.manifest["tokens"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{json_path} is no manifest of a token file: build it again") from None

        with open(bin_path, "rb") as opened:
            head = opened.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise DataError(f"{bin_path} does not begin with {MAGIC.decode()}: it is no token file")
        _, kind, count, digest = HEADER.unpack(head)
        dtype = DTYPES.get(kind.rstrip(b"\0").decode("ascii", "replace"))
        if dtype is None:
            raise DataError(f"{bin_path} has ids of the unknown type {kind!r}: known are {', '.join(DTYPES)}")
        self.tokenizer_sha256 = digest.hex()
        if tokenizer_sha256 is not None and tokenizer_sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{bin_path} was made with tokenizer {self.tokenizer_sha256[:12]}, not {tokenizer_sha256[:12]}: "
                "tokenise the corpus again"
            )
        _check_size(bin_path, HEADER.size + count * dtype.itemsize)
        _check_size(idx_path, documents * 8)
        if count != declared:
            raise DataError(f"{bin_path} has {count} ids and its manifest says {declared}: build it again")

        starts = np.fromfile(idx_path, dtype="<u8").astype(np.int64)
        self.starts: NDArray[np.int64] = np.append(starts, count)
        if documents and (starts[0] != 0 or (np.diff(self.starts) < 0).any()):
            raise DataError(f"{idx_path} does not rise from 0 to {count}: build it again")
        if not documents and count:
            raise DataError(f"{idx_path} names no document for {count} ids: build it again")
        self.ids: NDArray[Any] = (
            np.memmap(bin_path, dtype=dtype, mode="r", offset=HEADER.size, shape=(count,))
            if count
            else np.empty(0, dtype)  # an empty map is refused by the system
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, document: int) -> NDArray[Any]:
        """The ids of a document: a read-only view, uint16 or uint32."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.ids[self.starts[document] : self.starts[document + 1]]

    def verify(self) -> None:
        """Read everything and compare it with the manifest's digests.

        Raises:
            DataError: a byte is not as it was written.
        """
        for file, key in zip(_names(self.path), ("bin_sha256", "idx_sha256"), strict=False):
            if sha256_of(file) != self.manifest.get(key):
                raise DataError(f"{file} has changed since it was written: build it again")


def write_token_file(
    path: Path | str,
    documents: Iterable[Sequence[int] | NDArray[Any]],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the three files; the manifest last, so that without it the set is unfinished.

    Args:
        path: common path of the files, without ending.
        documents: ids of each; kept as they are, so the caller adds the marks of begin and end.
        vocab_size: bound of the ids; up to 65,536 they take two bytes each.
        tokenizer_sha256: hexadecimal digest of tokenizer.json.
        manifest: source, licence and whatever else is to be known later.
    Returns:
        The manifest as written.
    Raises:
        DataError: an id is outside the vocabulary.
        SaveError: the file system refused; without a manifest, what lies there is not taken for a token file.
    """
    stem = _stem(path)
    bin_path, idx_path, json_path = _names(stem)
    json_path.unlink(missing_ok=True)
    kind = "u16" if vocab_size <= 1 << 16 else "u32"
    starts: list[int] = []
    count = 0
    with write_aside(bin_path) as aside, open(aside, "wb") as file:
        file.write(bytes(HEADER.size))
        for number, document in enumerate(documents):
            ids = np.asarray(document, dtype=np.int64)
            if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
                raise DataError(f"document {number} has an id outside 0..{vocab_size - 1}: take its own tokenizer")
            starts.append(count)
            count += ids.size
            file.write(ids.astype(DTYPES[kind]).tobytes())
        file.seek(0)
        file.write(HEADER.pack(MAGIC, kind.encode(), count, bytes.fromhex(tokenizer_sha256)))
    with write_aside(idx_path) as aside:
        aside.write_bytes(np.array(starts, dtype="<u8").tobytes())
    whole = {
        **manifest,
        "documents": len(starts),
        "tokens": count,
        "tokenizer_sha256": tokenizer_sha256,
        "bin_sha256": sha256_of(bin_path),
        "idx_sha256": sha256_of(idx_path),
    }
    write_json(json_path, whole)
    return whole


def digest_of(texts: Iterable[str]) -> str:
    """SHA-256 over the digests of texts, in their order: what a manifest says of its source."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _stem(path: Path | str) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".json") else path


def _names(stem: Path) -> tuple[Path, Path, Path]:
    return (
        stem.with_name(stem.name + ".bin"),
        stem.with_name(stem.name + ".idx"),
        stem.with_name(stem.name + ".json"),
    )


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size != expected:
        raise DataError(f"{path} has {size} bytes and should have {expected}: it was cut off; build it again")
