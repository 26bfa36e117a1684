"""The first question about a long text: its reading is shown as it goes on, and others reuse it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from abyssal.base.progress import Progress
from abyssal.chat.local import LocalCompleter
from abyssal.train.skills.asking import Bench, T
from abyssal.train.skills.rates import Row

LOOK_S = 5.0


def read_first(bench: Bench, label: str, items: Sequence[T], judge: Callable[[T], Awaitable[Row]]) -> None:
    """Ask the first item that the journal lacks, alone: asked together, all would read the text.

    Args:
        bench: model and journal.
        label: of the progress.
        items: about one text.
        judge: as for `Bench.rows`.
    """
    first = next((item for item in items if bench.journal.get(item.id) is None), None)
    if first is not None:
        asyncio.run(_read(bench, label, first, judge))


async def _read(bench: Bench, label: str, item: T, judge: Callable[[T], Awaitable[Row]]) -> None:
    watch = asyncio.create_task(_watched(bench, label))
    try:
        row = await judge(item)
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    bench.journal.add({"id": item.id, **row})


async def _watched(bench: Bench, label: str) -> None:
    """Show how much of its prompt our engine has read; other completers do not tell."""
    if not isinstance(bench.completer, LocalCompleter):
        return
    records = bench.completer.engine.records
    while not records:
        await asyncio.sleep(LOOK_S / 10)
    record = records[max(records)]
    with Progress(record.prompt_tokens, "tokens", f"{label}: reading", silent=bench.silent) as progress:
        while True:
            progress.advance(record.read - progress.done)
            await asyncio.sleep(LOOK_S)
