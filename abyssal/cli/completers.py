"""What answers: a model in this process, or an engine elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.cli.models import open_model, parse_bytes

if TYPE_CHECKING:
    from abyssal.chat.local import LocalCompleter
    from abyssal.chat.remote import RemoteCompleter
    from abyssal.encoding.snapshots import Snapshot


def open_local(
    model: str,
    snapshot: Snapshot,
    *,
    cache_memory: str | None = None,
    max_memory: str | None = None,
    disk_cache: bool = True,
) -> LocalCompleter:
    """A model in this process.

    Args:
        model: a folder, or the bundled model.
        snapshot: whose encoding it knows.
        cache_memory: a size such as 2GiB.
        max_memory: the same for the whole process, which then reads experts from disk.
        disk_cache: whether prefixes are kept on disk too.
    Raises:
        InputError: as `open_model`.
    """
    from abyssal.chat.local import LocalCompleter

    budget = parse_bytes(cache_memory) if cache_memory else None
    limit = parse_bytes(max_memory) if max_memory else None
    tokenizer, engine = open_model(model, cache_bytes=budget, max_memory=limit, disk=disk_cache)
    return LocalCompleter(engine, tokenizer, model.rstrip("/").rsplit("/", 1)[-1], snapshot)


def open_remote(
    url: str,
    snapshot: Snapshot,
    *,
    model: str | None = None,
    key: str | None = None,
    tokenizer: Path | None = None,
    context: int | None = None,
) -> RemoteCompleter:
    """A model that another engine serves; needs no torch.

    Args:
        url: where that is.
        snapshot: whose encoding the model knows.
        model: its name there; None for the first.
        key: the engine's.
        tokenizer: a folder with its tokenizer.json, or None.
        context: None for what the engine says.
    Raises:
        InputError: as `RemoteCompleter.connect`.
        CheckpointError: there is no such tokenizer.
    """
    from abyssal.chat.remote import RemoteCompleter
    from abyssal.encoding.tokenizer import Tokenizer

    known = Tokenizer(tokenizer) if tokenizer is not None else None
    return RemoteCompleter.connect(url, model=model, key=key, tokenizer=known, context=context, snapshot=snapshot)
