"""Facts hidden in prose, and questions about them at the end.

The keys of the facts share prefixes ("amber lighthouse keeper", "amber lighthouse pilot"), so a key has to be
read whole. Half of the questions are about a fact shortly before the end, half about one anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from abyssal.train.data.example import MODES, Example, Message, Passage, ThinkingMode, assistant, user
from abyssal.train.data.phrases import fill, phrases
from abyssal.train.data.pools import Split, pick, pick_some, wide_pool

Kind = Literal["single", "multi_key", "key_value"]
KINDS: tuple[Kind, ...] = ("single", "multi_key", "key_value")
CONFUSABLE = 3  # facts beside the asked one where there is a single needle; their keys share its prefix
SENTENCES = (3, 8)  # of a paragraph
LINES = 4096  # of a list; in a longer text they are scattered
TURN = 4  # tokens that the template adds to a question and its answer
SMALLEST = 96  # tokens: less has no room for four facts and a question


@dataclass(frozen=True)
class Fact:
    """What is told about a key."""

    key: str
    attribute: str
    value: str
    sentence: str


@dataclass(frozen=True)
class Haystack:
    """A text with its facts, and what will be asked.

    Attributes:
        text: the prose, or the lines of keys and values.
        asked: facts in the order of their questions.
        questions: one for each.
        distances: tokens between each asked fact and the end of the text.
        tokens: length of the text.
    """

    text: str
    asked: list[Fact]
    questions: list[str]
    distances: list[int]
    tokens: int


@dataclass(frozen=True)
class Retrieval:
    """The generator.

    Args:
        count: tokens of a text, by the tokenizer of the model.
        split: part of the word pools.
        kinds: to choose from.
        lengths: of the whole in tokens but for what is thought, chosen evenly on a logarithmic scale.
        questions: how many, both ends included.
        near: tokens before the end within which half of the asked facts stand.
        modes: thinking modes to choose from; where there is thinking, one question is asked, since the thinking of
            earlier turns is dropped.
        filler: sentences of prose to put between the facts, in their order from a random place; without them they
            are made up.
        rounds: how often each question is asked. With more than one, facts and questions fill the text,
            so that much of it is learnt from; otherwise half of it is prose, or lines that nobody asks for.
    """

    count: Callable[[str], int]
    split: Split = "train"
    kinds: Sequence[Kind] = KINDS
    lengths: tuple[int, int] = (256, 2048)
    questions: tuple[int, int] = (1, 4)
    near: int = 128
    modes: Sequence[ThinkingMode] = MODES
    filler: Sequence[str] = field(default=(), repr=False)
    rounds: int = 1

    def generate(
        self,
        rng: np.random.Generator,
        *,
        kind: Kind | None = None,
        length: int | None = None,
        depth: float | None = None,
        questions: int | None = None,
        mode: ThinkingMode | None = None,
    ) -> Example:
        """A conversation: the text with the first question, the answers, the other questions.

        Args:
            rng: the only source of chance.
            kind: one of `KINDS`; otherwise any of the generator's.
            length: tokens of the whole, which are reached to within a sentence and not passed.
            depth: where the asked facts stand: 0 at the beginning, 1 at the end.
            questions: how many.
            mode: what is thought: nothing, the sentence that tells the fact, or that and what it is about.
        Raises:
            ValueError: the length is too short for facts and questions.
        """
        chosen = kind if kind is not None else pick(rng, self.kinds)
        chosen_mode = mode if mode is not None else pick(rng, self.modes)
        if questions is None and chosen_mode != "non-think":
            questions = 1
        hay = self.haystack(rng, kind=chosen, length=length, depth=depth, questions=questions)
        messages: list[Message] = []
        for number, (fact, question) in enumerate(zip(hay.asked, hay.questions, strict=True)):
            messages.append(user(question if number else f"{hay.text}\n\n{question}"))
            thought = {
                "non-think": "",
                "think-high": f"The text says: {fact.sentence}",
                "think-max": f"The question is about the {fact.key}. I look for it. The text says: {fact.sentence}\n"
                f"Other keys may begin alike, but this is the {fact.key}. The value is {fact.value}.",
            }[chosen_mode]
            messages.append(assistant(fact.value, thought))
        return Example(messages, "retrieval", chosen_mode, source=chosen, meta=self._meta(hay, depth))

    def passage(
        self,
        rng: np.random.Generator,
        *,
        kind: Kind | None = None,
        length: int | None = None,
        depth: float | None = None,
        questions: int | None = None,
    ) -> Passage:
        """The same as running text, for pre-training; arguments as for `generate`."""
        chosen = kind if kind is not None else pick(rng, self.kinds)
        hay = self.haystack(rng, kind=chosen, length=length, depth=depth, questions=questions)
        text = f"{hay.text}\n"
        answers = []
        for fact, question in zip(hay.asked, hay.questions, strict=True):
            text += f"\n{question} "
            answers.append((len(text), len(text) + len(fact.value)))
            text += fact.value
        return Passage(text, tuple(answers), "retrieval", {"kind": chosen, **self._meta(hay, depth)})

    def haystack(
        self,
        rng: np.random.Generator,
        *,
        kind: Kind,
        length: int | None = None,
        depth: float | None = None,
        questions: int | None = None,
    ) -> Haystack:
        """The text and its questions; arguments as for `generate`."""
        if length is None:
            low, high = np.log(self.lengths[0]), np.log(self.lengths[1])
            length = round(float(np.exp(rng.uniform(low, high))))
        if length < SMALLEST:
            raise ValueError(f"{length} tokens have no room for facts and a question: take at least {SMALLEST}")
        wanted = questions or int(rng.integers(self.questions[0], self.questions[1] + 1))
        facts = self._facts(rng, kind, length)
        asked = self._asked(rng, kind, facts, wanted, length)
        questions_text = [self._question(rng, kind, fact) for fact in asked]
        room = length - sum(
            self.count(q) + self.count(f.value) + TURN for q, f in zip(questions_text, asked, strict=True)
        )
        before = dict.fromkeys((fact.key for fact in facts), "\n" if kind == "key_value" else " ")
        costs = {fact.key: self.count(before[fact.key] + fact.sentence) for fact in facts}
        # facts that are not asked for give way where the text is too short for all
        once = list(dict.fromkeys(asked))
        others = _fitting([fact for fact in facts if fact not in asked], costs, room - _total(once, costs))
        targets = {fact.key: self._target(rng, room - costs[fact.key], depth) for fact in asked}
        return self._woven(rng, asked, others, targets, before, costs, room, questions_text)

    def shared(
        self, rng: np.random.Generator, length: int, depths: Mapping[Kind, Sequence[float]]
    ) -> Haystack:
        """A text with facts of several kinds, for many questions that are asked one at a time.

        Every asked fact that is a single needle has confusable ones of its own; what is not asked lies anywhere.

        Args:
            rng: the only source of chance.
            length: tokens of the text, which are reached to within a sentence and not passed.
            depths: for each kind, where its asked facts stand: 0 at the beginning, 1 at the end.
        Returns:
            the text, with the facts in the order of `depths`, kind by kind.
        Raises:
            ValueError: the length is too short for the facts.
        """
        asked: list[Fact] = []
        others: list[Fact] = []
        before: dict[str, str] = {}
        for kind, places in depths.items():
            facts = self._facts(rng, kind, length // len(depths), len(places), taken=before)
            before |= dict.fromkeys((fact.key for fact in facts), "\n" if kind == "key_value" else " ")
            # of single needles, one of each family
            chosen = facts[:: 1 + CONFUSABLE] if kind == "single" else pick_some(rng, facts, len(places))
            asked += chosen
            others += [fact for fact in facts if fact not in chosen]
        wanted = [depth for places in depths.values() for depth in places]
        costs = {fact.key: self.count(before[fact.key] + fact.sentence) for fact in (*asked, *others)}
        if len(asked) < len(wanted) or _total(asked, costs) > length:
            raise ValueError(f"{length} tokens have no room for {len(wanted)} facts: ask fewer, or take a longer text")
        others = _fitting(others, costs, length - _total(asked, costs))
        targets = {fact.key: depth * (length - costs[fact.key]) for fact, depth in zip(asked, wanted, strict=True)}
        hay = self._woven(rng, asked, others, targets, before, costs, length)
        kinds = [kind for kind, places in depths.items() for _ in places]
        questions = [self._question(rng, kind, fact) for kind, fact in zip(kinds, asked, strict=True)]
        return replace(hay, questions=questions)

    def _woven(
        self,
        rng: np.random.Generator,
        asked: list[Fact],
        others: list[Fact],
        targets: dict[str, float],
        before: dict[str, str],
        costs: dict[str, int],
        room: int,
        questions: Sequence[str] = (),
    ) -> Haystack:
        """Facts in prose of so many tokens: the asked ones at their targets, the others anywhere."""
        targets = targets | {fact.key: rng.uniform(0, room - costs[fact.key]) for fact in others}
        ordered = sorted([*dict.fromkeys(asked), *others], key=lambda fact: targets[fact.key])
        pieces, ends = self._laid(rng, before, ordered, targets, costs, room)
        text = "".join(pieces).strip()
        tokens = self.count(text)
        distances = [max(tokens - ends[fact.key], 0) for fact in asked]
        return Haystack(text, asked, list(questions), distances, tokens)

    def _meta(self, hay: Haystack, depth: float | None) -> dict[str, object]:
        return {
            "targets": [fact.value for fact in hay.asked],
            "keys": [fact.key for fact in hay.asked],
            "distances": hay.distances,
            "tokens": hay.tokens,
            "depth": depth,
        }

    def _facts(
        self, rng: np.random.Generator, kind: Kind, length: int, needles: int = 1, taken: Collection[str] = ()
    ) -> list[Fact]:
        """Facts about different keys; one attribute, so that only the key tells them apart.

        Args:
            rng: the only source of chance.
            kind: how many, and how they are told.
            length: tokens of the text.
            needles: single needles, each with confusable ones behind it.
            taken: keys that others have.
        """
        if kind == "single":
            many = needles * (1 + CONFUSABLE)
        elif kind == "multi_key":
            many = int(np.clip(length // self._apart(kind), 4, 48))
        elif self.rounds > 1:
            many = int(np.clip(length // self._apart(kind), 3, LINES))
        else:
            many = int(np.clip(length // 9, 8, LINES))
        attribute = pick(rng, phrases("attributes"))
        line = pick(rng, phrases("lines"))
        found: dict[str, Fact] = {}
        families: list[tuple[str, str]] = []
        while len(found) < many:
            # a family shares its first two words; half of the keys join one that is there
            if families and kind == "single" and len(found) < len(families) * (1 + CONFUSABLE):
                family = pick(rng, families[-1:])
            elif families and kind != "single" and rng.random() < 0.5:
                family = pick(rng, families)
            else:
                family = self._family(rng)
                families.append(family)
            key = " ".join((*family, pick(rng, wide_pool("roles", self.split))))
            if key in found or key in taken:  # a large list may have used up a family's roles
                if kind != "single":
                    families.append(self._family(rng))
                continue
            value = self._value(rng, kind)
            if kind == "key_value":
                sentence = line.format(key=key, value=value)
            else:
                sentence = fill(
                    rng, self.split, pick(rng, phrases("needles")), key=key, attribute=attribute, value=value
                )
            found[key] = Fact(key, attribute, value, sentence)
        return list(found.values())

    def _family(self, rng: np.random.Generator) -> tuple[str, str]:
        """Two words that keys begin with."""
        return pick(rng, wide_pool("adjectives", self.split)), pick(rng, wide_pool("places", self.split))

    def _value(self, rng: np.random.Generator, kind: Kind) -> str:
        """A number, as single needles have it by custom; where many keys are told apart, some values are words."""
        if kind == "single" or rng.random() < 0.6:
            digits = int(rng.integers(4, 8))
            return str(int(rng.integers(10 ** (digits - 1), 10**digits)))
        return f"{pick(rng, wide_pool('things', self.split))}-{int(rng.integers(10, 1000))}"

    def _asked(self, rng: np.random.Generator, kind: Kind, facts: list[Fact], wanted: int, length: int) -> list[Fact]:
        most = max(1, min(len(facts), length // self._apart(kind)))
        chosen = pick_some(rng, facts, min(wanted, most))
        return chosen + [fact for _ in range(self.rounds - 1) for fact in pick_some(rng, chosen, len(chosen))]

    def _apart(self, kind: Kind) -> int:
        """Tokens of a text for each fact that is asked for."""
        if self.rounds == 1:
            return 50 if kind == "key_value" else 80  # of which fact and question cost about 40
        fact, question = (14, 17) if kind == "key_value" else (22, 24)
        return fact + self.rounds * question

    def _question(self, rng: np.random.Generator, kind: Kind, fact: Fact) -> str:
        phrase = pick(rng, phrases("lookups" if kind == "key_value" else "questions"))
        return fill(rng, self.split, phrase, key=fact.key, attribute=fact.attribute)

    def _target(self, rng: np.random.Generator, room: int, depth: float | None) -> float:
        if depth is not None:
            return depth * room
        if rng.random() < 0.5:
            return max(room - rng.uniform(0, self.near), 0)
        return float(rng.uniform(0, max(room - self.near, 1)))

    def _laid(
        self,
        rng: np.random.Generator,
        before: dict[str, str],
        facts: list[Fact],
        targets: dict[str, float],
        costs: dict[str, int],
        room: int,
    ) -> tuple[list[str], dict[str, int]]:
        """Facts and filler in order, and where each fact ends in tokens."""
        pieces: list[str] = []
        ends: dict[str, int] = {}
        used = 0
        left = _total(facts, costs)
        waiting = list(reversed(facts))
        until_break = int(rng.integers(*SENTENCES))
        place = int(rng.integers(len(self.filler))) if self.filler else 0
        full = set(before.values()) == {"\n"} and 2 * left > room  # a list without prose between its lines
        while True:
            while waiting and (full or targets[waiting[-1].key] <= used):
                fact = waiting.pop()
                pieces.append(before[fact.key] + fact.sentence)
                used += costs[fact.key]
                left -= costs[fact.key]
                ends[fact.key] = used
            if full and not waiting:
                return pieces, ends
            if self.filler:
                sentence = self.filler[place % len(self.filler)]
                place += 1
            else:
                sentence = fill(rng, self.split, pick(rng, phrases("filler")))
            until_break -= 1
            separator = "\n" if until_break == 0 else " "
            if until_break == 0:
                until_break = int(rng.integers(*SENTENCES))
            cost = self.count(separator + sentence)
            if used + cost + left > room:
                full = True
                continue
            pieces.append(separator + sentence)
            used += cost


def _total(facts: Sequence[Fact], costs: Mapping[str, int]) -> int:
    """Tokens of the facts."""
    return sum(costs[fact.key] for fact in facts)


def _fitting(facts: Sequence[Fact], costs: Mapping[str, int], room: int) -> list[Fact]:
    """The facts that fit into so many tokens, the first ones before the others."""
    fitting = []
    for fact in facts:
        if costs[fact.key] <= room:
            room -= costs[fact.key]
            fitting.append(fact)
    return fitting


def sentences_of(text: str) -> list[str]:
    """The sentences of prose, for `filler`."""
    return [s for line in text.split("\n") for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", line.strip()) if s]
