"""Who computes what in the next step; plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """What the scheduler knows of a running answer.

    Attributes:
        number: names it.
        left: tokens that are known and not yet read; 1 for an answer that decodes.
        most: the longest pass that it should make, 1 or more (a prompt stops where its state is to be kept).
        drafts: tokens that it would like to try beyond the known ones; only if it decodes.
        served: the step in which it was last served.
    """

    number: int
    left: int
    most: int
    drafts: int
    served: int


@dataclass(frozen=True)
class Work:
    """Tokens of one answer in a step: `tokens` known ones and up to `drafts` drafted ones."""

    number: int
    tokens: int
    drafts: int = 0


def plan(jobs: Sequence[Job], budget: int, chunk: int) -> list[Work]:
    """The work of a step.

    Answers that decode go first; who waited longest is first among them. What is left of the budget goes to
    prompts in chunks, again to who waited longest, so that a short prompt does not stand behind a long one. A
    quarter of the budget is kept for prompts if there are any, so that they move under any load.

    Args:
        jobs: the running answers.
        budget: tokens of a step.
        chunk: most tokens of one prompt in a step.
    """
    waiting = sorted(jobs, key=lambda job: (job.served, job.number))
    prompts = [job for job in waiting if job.left > 1]
    room = budget - (max(budget // 4, 1) if prompts else 0)
    works: list[Work] = []
    for job in waiting:
        if job.left == 1 and room > 0:
            drafts = min(job.drafts, room - 1)
            works.append(Work(job.number, 1, drafts))
            room -= 1 + drafts
            budget -= 1 + drafts
    for job in prompts:
        tokens = min(job.left, job.most, chunk, budget)
        if tokens > 0:
            works.append(Work(job.number, tokens))
            budget -= tokens
    return works
