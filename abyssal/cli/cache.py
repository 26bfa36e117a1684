"""`abyssal cache`: what is kept of prompts, and where two prompts part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from abyssal.cli.models import BUNDLED, folder_of, open_disk_cache, read_text

AROUND = 12  # tokens shown on each side of the place where two prompts part

cache = typer.Typer(help="The prefix cache on disk.", no_args_is_help=True)


@cache.command()
def stats(json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Show where it lies and how large it is."""
    disk = open_disk_cache()
    facts = {"folder": str(disk.folder), "entries": disk.count, "bytes": disk.bytes, "budget": disk.budget}
    if json_out:
        print(json.dumps(facts))
    else:
        room = f"{disk.bytes / 1e6:,.1f} MB of at most {disk.budget / 1e9:.1f} GB"
        print(f"{disk.folder}: {disk.count:,} entries, {room}")


@cache.command()
def clear() -> None:
    """Remove every entry."""
    open_disk_cache().clear()


@cache.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A file with a prompt.")],
    b: Annotated[Path, typer.Argument(help="A file with another one.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer: a release folder, or nano.")] = BUNDLED,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show where two prompts part, and how much of one the other can reuse."""
    from abyssal.encoding.literals import BOS
    from abyssal.encoding.tokenizer import Piece, Tokenizer
    from abyssal.kvcache.memory import PAGE_TOKENS

    tokenizer = Tokenizer(folder_of(model))
    first, second = (
        tokenizer.encode_pieces([Piece(BOS, special=True), Piece(read_text(path))]) for path in (a, b)
    )
    shorter = min(len(first), len(second))
    common = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    reused = min(common, max(len(second) - 1, 0)) // PAGE_TOKENS * PAGE_TOKENS
    before = tokenizer.decode(first[max(common - AROUND, 0) : common])
    ends = [tokenizer.decode(ids[common : common + AROUND]) for ids in (first, second)]
    if json_out:
        facts = {"a_tokens": len(first), "b_tokens": len(second), "common_tokens": common, "reused_tokens": reused}
        print(json.dumps({**facts, "before": before, "a_next": ends[0], "b_next": ends[1]}, ensure_ascii=False))
        return
    print(f"{a}: {len(first):,} tokens; {b}: {len(second):,} tokens")
    if first == second:
        print("they are equal")
    else:
        print(f"they part at token {common}, after {before!r}:")
        print(f"  {a} goes on {ends[0]!r}" if ends[0] else f"  {a} ends")
        print(f"  {b} goes on {ends[1]!r}" if ends[1] else f"  {b} ends")
    print(f"the second can reuse {reused:,} tokens of the first, in pages of {PAGE_TOKENS}")
