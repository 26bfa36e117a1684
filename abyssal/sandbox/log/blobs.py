"""Streams and files of operations: small ones lie in the record, others in a folder under their digest."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abyssal.base.files import write_bytes
from abyssal.sandbox.errors import LogError
from abyssal.sandbox.log.records import sha256

# A blob costs two flushes of the disk, a record shares one: below this, a record is cheaper.
INLINE = 4096


@dataclass(frozen=True)
class Kept:
    """What is kept of a stream.

    Attributes:
        data: its bytes; where the middle is missing, the beginning and the end.
        total: bytes that there were.
        head: bytes of `data` that are the beginning; all, where nothing is missing.
    """

    data: bytes
    total: int
    head: int

    @property
    def truncated(self) -> bool:
        """Whether the middle is missing."""
        return self.total > len(self.data)


def whole(data: bytes) -> Kept:
    """A stream of which nothing is missing."""
    return Kept(data, len(data), len(data))


class Blobs:
    """A folder of immutable files named by their SHA-256.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self.folder / digest[:2] / digest

    def put(self, data: bytes) -> str:
        """Keep bytes; durable when this returns.

        Raises:
            SaveError: the disk refused.
        """
        digest = sha256(data)
        path = self.path(digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """Bytes of a blob.

        Raises:
            LogError: it is missing or not what its name says.
        """
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise LogError(f"{digest!r} is no digest of a blob")
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LogError(f"the log's blob {path} cannot be read ({error.strerror}): the log is damaged") from None
        if sha256(data) != digest:
            raise LogError(f"the log's blob {path} is not what its name says: it was changed or is damaged")
        return data

    def keep(self, kept: Kept) -> dict[str, Any]:
        """The entry of a record for a stream, whose bytes are durable when this returns or lie in the entry."""
        entry: dict[str, Any] = {"bytes": len(kept.data), "truncated_from": None}
        if kept.truncated:
            entry |= {"truncated_from": kept.total, "head": kept.head}
        if len(kept.data) <= INLINE:
            return entry | {"sha256": sha256(kept.data), "inline": base64.b64encode(kept.data).decode()}
        return entry | {"sha256": self.put(kept.data)}

    def fetch(self, entry: Mapping[str, Any]) -> Kept:
        """The stream of an entry.

        Raises:
            LogError: its bytes are missing, or others than the entry says.
        """
        inline = entry.get("inline")
        if inline is not None:
            data = base64.b64decode(inline)
            if sha256(data) != entry["sha256"]:
                raise LogError("a record's inline bytes are not what its digest says: it was changed")
        else:
            data = self.get(entry["sha256"])
        total = entry["truncated_from"]
        return whole(data) if total is None else Kept(data, total, entry["head"])
