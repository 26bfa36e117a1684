"""How much of everything an evaluation asks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from abyssal.train.data.example import MODES, ThinkingMode

GRID = tuple(tenth / 10 for tenth in range(11))
RESERVE = 512  # tokens of a whole that are kept for template, question and answer


@dataclass(frozen=True)
class Stretch:
    """Retrieval items of one length.

    Attributes:
        length: tokens of text, question and answer.
        items: of each kind; they stand at the depths of the plan in turn.
        per_text: items that share a text and, through the prefix cache, its reading. With 1, each has its own.
        joint: the kinds share a text too: one reading for all, where one takes hours.
    """

    length: int
    items: int
    per_text: int = 1
    joint: bool = False

    @property
    def name(self) -> str:
        """Two stretches of one name have the same items, as far as both go."""
        shared = f" shared by {self.per_text}" if self.per_text > 1 else ""
        return f"{self.length}{shared}{' jointly' if self.joint else ''}"


@dataclass(frozen=True)
class Plan:
    """Numbers of items.

    Attributes:
        retrieval: by length.
        depths: of the asked facts: 0 at the beginning of a text, 1 at its end.
        retrieval_modes, tool_modes: thinking modes in which these are asked.
        tools: conversations of each kind and mode, held to the grammar of calls.
        free: how many of these are asked without the grammar too.
        arithmetic: problems; each is asked in all three modes.
        chat, copying: items of each kind.
        part: bytes of prose and code that are read as one, for bits per byte.
        parts: how many of these, spread evenly; None for all.
    """

    retrieval: tuple[Stretch, ...]
    tools: int
    free: int
    arithmetic: int
    chat: int
    copying: int
    depths: tuple[float, ...] = GRID
    retrieval_modes: tuple[ThinkingMode, ...] = ("non-think",)
    tool_modes: tuple[ThinkingMode, ...] = MODES
    part: int = 8192
    parts: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max((stretch.length for stretch in self.retrieval), default=0)


# minutes on a small machine: while a run goes on
QUICK = Plan((Stretch(1024, 33), Stretch(4096, 33)), tools=24, free=8, arithmetic=40, chat=12, copying=12, parts=24)
# all that a model card tells, but for the texts of 1M tokens; most of an hour on a small machine
FULL = Plan(
    (Stretch(4096, 66, per_text=3), Stretch(32768, 66, per_text=11), Stretch(131072, 44, per_text=22)),
    tools=60,
    free=20,
    arithmetic=90,
    chat=30,
    copying=30,
)
# and one text of 1M tokens, with questions of all kinds about it
MILLION = replace(FULL, retrieval=(*FULL.retrieval, Stretch(1 << 20, 22, per_text=22, joint=True)))
PLANS = {"quick": QUICK, "full": FULL, "million": MILLION}
