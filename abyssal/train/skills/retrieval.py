"""Facts found in prose among confusable keys, by kind, length and depth (training.md 8.3).

Items of one length may share a text: it is read once, and the prefix cache gives it to the questions behind the
first. A text of 1M tokens takes hours to read, so there one text holds the facts of all kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from abyssal.chat.api import Completer
from abyssal.encoding.tokenizer import Piece
from abyssal.train.data.example import ThinkingMode, user
from abyssal.train.data.pools import seeded
from abyssal.train.data.retrieval import KINDS, Kind, Retrieval
from abyssal.train.skills.asking import AT_ONCE, Bench, Reply, ask
from abyssal.train.skills.plan import RESERVE, Plan, Stretch
from abyssal.train.skills.rates import Row, counts, rates
from abyssal.train.skills.reading import read_first

MOST: dict[ThinkingMode, int] = {"non-think": 32, "think-high": 128, "think-max": 256}  # tokens of an answer
TOKENS_AT_ONCE = 1 << 19  # of all prompts under way: each is also a list of numbers


@dataclass(frozen=True)
class Question:
    """A text with a question about it.

    Attributes:
        id: its name.
        text: what is to be searched.
        question: what is asked.
        target: the value that is right.
        labels: what the results are sorted by.
    """

    id: str
    text: str
    question: str
    target: str
    labels: dict[str, Any]

    @property
    def prompt(self) -> str:
        """What the user says."""
        return f"{self.text}\n\n{self.question}"


@dataclass(frozen=True)
class Place:
    """An item before its text is made."""

    id: str
    kind: Kind
    depth: float
    number: int


def score_retrieval(bench: Bench, plan: Plan, filler: Callable[[int], Sequence[str]], seed: int = 0) -> dict[str, Any]:
    """Rates by kind, by length and by depth, and what wrong answers were.

    Args:
        bench: model and journal.
        plan: lengths, items and modes.
        filler: sentences of prose that stand between the facts of a text of so many tokens; none for made-up ones.
        seed: another one gives other items.
    Raises:
        ValueError: a length has no room for the facts that share its text.
    """
    rows: list[Row] = []
    for mode in plan.retrieval_modes:
        judge = partial(_judged, bench, mode)
        for stretch in plan.retrieval:
            label = f"retrieval at {stretch.length:,} tokens, {mode}"
            for part in parts_of(stretch, plan.depths, mode):
                done = [row for place in part if (row := bench.journal.get(place.id)) is not None]
                if len(done) < len(part):  # a text is made only if something is left to ask about it
                    questions = list(questions_of(stretch, part, mode, bench.completer, filler(stretch.length), seed))
                    if stretch.per_text > 1:
                        read_first(bench, label, questions, judge)
                    done = bench.rows(label, questions, judge, max(1, min(AT_ONCE, TOKENS_AT_ONCE // stretch.length)))
                rows += done
    return {
        "by_kind": rates(rows, "mode", "kind"),
        "by_length": rates(rows, "mode", "kind", "length"),
        "grid": rates(rows, "mode", "kind", "length", "depth"),
        "outcomes": counts(rows, "mode", "kind", "length"),
    }


def parts_of(stretch: Stretch, depths: Sequence[float], mode: ThinkingMode) -> Iterator[list[Place]]:
    """Items that are asked together: those of one text, or all that have one each."""
    places = {
        kind: [
            Place(f"retrieval/{mode}/{kind}/{stretch.name}/{number}", kind, depths[number % len(depths)], number)
            for number in range(stretch.items)
        ]
        for kind in KINDS
    }
    size = stretch.per_text if stretch.per_text > 1 else max(stretch.items, 1)
    for start in range(0, stretch.items, size):
        parts = [places[kind][start : start + size] for kind in KINDS]
        if stretch.joint:
            yield [place for part in parts for place in part]
        else:
            yield from parts


def questions_of(
    stretch: Stretch,
    part: Sequence[Place],
    mode: ThinkingMode,
    completer: Completer,
    filler: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Question]:
    """The items of a part with their texts.

    Args:
        stretch: their length.
        part: of `parts_of`.
        mode: in which they will be asked.
        completer: whose tokens count.
        filler: sentences of prose, see `data.retrieval.Retrieval`.
        seed: another one gives other items.
    """
    maker = Retrieval(lambda text: completer.count([Piece(text)]), "held_out", filler=filler)
    if stretch.per_text == 1:
        for place in part:
            rng = seeded(f"retrieval {place.kind} {stretch.name}", "held_out", place.number, seed)
            room = stretch.length - MOST[mode]
            hay = maker.haystack(rng, kind=place.kind, length=room, depth=place.depth, questions=1)
            yield _question(place, stretch, hay.text, hay.questions[0], hay.asked[0].value, hay.distances[0], mode)
        return
    depths: dict[Kind, list[float]] = {}
    for place in part:
        depths.setdefault(place.kind, []).append(place.depth)
    kinds = "all" if stretch.joint else part[0].kind
    rng = seeded(f"retrieval {kinds} {stretch.name}", "held_out", part[0].number, seed)
    hay = maker.shared(rng, stretch.length - RESERVE, depths)
    for place, fact, question, distance in zip(part, hay.asked, hay.questions, hay.distances, strict=True):
        yield _question(place, stretch, hay.text, question, fact.value, distance, mode)


def _question(
    place: Place, stretch: Stretch, text: str, question: str, target: str, distance: int, mode: ThinkingMode
) -> Question:
    labels = {"mode": mode, "kind": place.kind, "length": stretch.length, "depth": place.depth, "distance": distance}
    return Question(place.id, text, question, target, labels)


async def _judged(bench: Bench, mode: ThinkingMode, item: Question) -> Row:
    reply = await ask(bench.completer, [user(item.prompt)], mode, MOST[mode])
    outcome = outcome_of(item, reply)
    said = {"question": item.question, "target": item.target, "reply": reply.to_json()}
    return {**item.labels, "passed": outcome == "right", "outcome": outcome, **said}


def outcome_of(item: Question, reply: Reply) -> str:
    """ "right", "elsewhere" (another part of the text), "invented", or "unfinished" (cut, malformed, empty)."""
    said = reply.text.strip()
    if said == item.target:
        return "right"
    if not said:
        return "unfinished"
    return "elsewhere" if said in item.text else "invented"
