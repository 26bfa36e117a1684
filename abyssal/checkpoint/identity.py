"""A name for a release's weights, by which caches on disk know them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

ENDS = 1 << 20  # bytes read at each end of a shard: hashing all of Pro would take minutes at every start


def identity_of(folder: Path | str) -> str:
    """A digest of the configuration, the tokenizer, and each shard's name, size, first and last MiB.

    Two releases with equal digests differ, if at all, in the middle of a shard of equal size and header: an
    edit in place. Whoever edits so should clear the cache.
    """
    digest = hashlib.sha256()
    folder = Path(folder)
    for path in sorted([*folder.glob("config.json"), *folder.glob("tokenizer.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            digest.update(file.read(ENDS))
    return digest.hexdigest()
