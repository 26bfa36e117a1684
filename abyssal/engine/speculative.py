"""Drafts by the MTP block (architecture.md 2.11), lossless by construction.

A draft is drawn from the MTP block's logits with the noise of the place where it would stand; the model's own
token is drawn from the model's logits with the same noise. Where the two agree, the next token is known
already. So every token of an answer, greedy or sampled, is the one that the model would have chosen anyway,
and close distributions agree often (the Gumbel coupling).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abyssal.engine.answer import Running
from abyssal.engine.runner import Runner


def remember_streams(run: Running, streams_TND: Tensor, read: int, window: int) -> None:
    """Keep the backbone's streams of tokens that were just read until the MTP block reads them.

    Args:
        streams_TND: of the last tokens before token `read`.
        window: tokens that the MTP block sees; of a prompt it reads no more.
    """
    if run.streams_TND is not None:
        streams_TND = torch.cat([run.streams_TND, streams_TND])
    elif run.mtp_position != read - len(streams_TND):
        run.mtp_position = run.mtp_since = read - len(streams_TND)
    if run.mtp_position == run.mtp_since:
        streams_TND = streams_TND[-window:]
        run.mtp_position = run.mtp_since = read - len(streams_TND)
    run.streams_TND = streams_TND.clone()


def propose(runner: Runner, runs: Sequence[Running], counts: Sequence[int]) -> list[list[int]]:
    """Drafts for answers that decode; each has its last token, not yet read, at the end of `tokens`.

    Args:
        counts: tokens to draft for each, 1 or more.
    """
    drafts: list[list[int]] = [[] for _ in runs]
    caches = [run.cache for run in runs if run.cache is not None]
    assert len(caches) == len(runs)
    parts, next_ids, lengths, starts = [], [], [], []
    for run in runs:
        assert run.streams_TND is not None
        length = len(run.streams_TND)
        parts.append(run.streams_TND)
        next_ids += run.tokens[run.mtp_position + 1 : run.mtp_position + 1 + length]
        lengths.append(length)
        starts.append(run.mtp_position)
        run.mtp_position += length
        run.streams_TND = None
    since = [run.mtp_since for run in runs]
    z_TD, streams_TND = runner.draft(torch.cat(parts), next_ids, caches, lengths, starts, since)
    last = torch.tensor(lengths).cumsum(0) - 1
    z_TD, streams_TND = z_TD[last], streams_TND[last]
    active = list(range(len(runs)))
    for step in range(max(counts)):
        logits = runner.logits(z_TD)
        for row, i in enumerate(active):
            run = runs[i]
            place = len(run.tokens) - len(run.request.prompt) + len(drafts[i])
            drafts[i].append(run.sampler.draw(logits[row], place, run.request.prompt, run.answer + drafts[i]))
        going = [row for row, i in enumerate(active) if len(drafts[i]) < counts[i]]
        if not going:
            break
        active = [active[row] for row in going]
        z_TD, streams_TND = runner.draft(
            streams_TND[going],
            [drafts[i][-1] for i in active],
            [caches[i] for i in active],
            [1] * len(active),
            [runs[i].mtp_position + step for i in active],
            [since[i] for i in active],
        )
    return drafts
