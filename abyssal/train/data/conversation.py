"""Short chat in whole sentences: greetings, facts, things told earlier, lists, comparisons, small stories.

Names, places and things are cut between training and evaluation; facts and greetings are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abyssal.train.data.example import MODES, Example, Message, ThinkingMode, assistant, user
from abyssal.train.data.phrases import SLOT, fill, phrases
from abyssal.train.data.pools import Split, pick, pick_some, pool
from abyssal.train.data.values import table

KINDS = ("talk", "fact", "context", "members", "larger", "story")
COUNTS = {2: "two", 3: "three", 4: "four"}
BETWEEN = 0.4  # of the conversations have something else between what is told and what is asked


@dataclass(frozen=True)
class Turn:
    """What is said, what is replied, and what may be thought before."""

    said: str
    reply: str
    thought: str


@dataclass(frozen=True)
class Chat:
    """The generator.

    Args:
        split: part of the word pools.
        turns: topics in a conversation, both ends included.
        modes: thinking modes to choose from.
    """

    split: Split = "train"
    turns: tuple[int, int] = (1, 3)
    modes: Sequence[ThinkingMode] = MODES

    def generate(
        self, rng: np.random.Generator, *, kind: str | None = None, mode: ThinkingMode | None = None
    ) -> Example:
        """A conversation; its last topic is of the kind that is asked for.

        Args:
            rng: the only source of chance.
            kind: one of `KINDS`.
            mode: how much is thought; otherwise any of the generator's.
        """
        chosen = kind if kind is not None else pick(rng, KINDS)
        chosen_mode = mode if mode is not None else pick(rng, self.modes)
        topics = [pick(rng, KINDS) for _ in range(int(rng.integers(self.turns[0], self.turns[1] + 1)) - 1)]
        turns = [turn for topic in (*topics, chosen) for turn in self._topic(rng, topic)]
        messages: list[Message] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": "You are a helpful assistant."})
        for turn in turns:
            thought = turn.thought if chosen_mode != "non-think" else ""
            if chosen_mode == "think-max":
                thought = f'The user says: "{turn.said}" {thought} I answer in whole sentences: {turn.reply}'
            messages += [user(turn.said), assistant(turn.reply, thought)]
        meta = {"targets": [turns[-1].reply]}
        return Example(messages, "conversation", chosen_mode, source=chosen, meta=meta)

    def _topic(self, rng: np.random.Generator, kind: str) -> list[Turn]:
        if kind == "talk":
            said, reply = pick(rng, phrases("small_talk")).split(" | ")
            return [Turn(said, reply, "I answer politely.")]
        if kind == "fact":
            return [self._fact(rng)]
        if kind == "context":
            return self._context(rng)
        if kind == "members":
            return [self._members(rng)]
        if kind == "larger":
            return [self._larger(rng)]
        return [self._story(rng)]

    def _fact(self, rng: np.random.Generator) -> Turn:
        name, question, answer = pick(rng, phrases("chat_facts")).split(" | ")
        left, right = pick(rng, list(table("facts")[name].items()))
        said, reply = (fill(rng, self.split, text, left=left, right=right) for text in (question, answer))
        return Turn(said, reply, "I know this.")

    def _context(self, rng: np.random.Generator) -> list[Turn]:
        """Something is told, and asked for later."""
        row = pick(rng, phrases("chat_context"))
        given = {
            "hour": str(int(rng.integers(1, 13))),
            "number": str(int(rng.integers(2, 100))),
            "color": pick(rng, table("facts")["members"]["colors"]),
            "weekday": pick(rng, list(table("facts")["next"])[:7]),
            "instrument": pick(rng, table("facts")["members"]["instruments"]).removeprefix("the "),
        }
        given |= {slot: pick(rng, pool(slot, self.split)) for _, slot in SLOT.findall(row) if slot not in given}
        told, reply, asked, answer = (fill(rng, self.split, text, **given) for text in row.split(" | "))
        between = [self._fact(rng)] if rng.random() < BETWEEN else []
        return [
            Turn(told, reply, "The user tells me something. I remember it."),
            *between,
            Turn(asked, answer, f'The user told me: "{told}"'),
        ]

    def _members(self, rng: np.random.Generator) -> Turn:
        group, members = pick(rng, list(table("facts")["members"].items()))
        count = pick(rng, list(COUNTS))
        chosen = pick_some(rng, members, count)
        listed = f"{', '.join(chosen[:-1])} and {chosen[-1]}"
        row = pick(rng, phrases("chat_members"))
        said, reply = (
            fill(rng, self.split, text, group=group, count=COUNTS[count], members=listed) for text in row.split(" | ")
        )
        return Turn(said, reply, f"I need {COUNTS[count]} {group}.")

    def _larger(self, rng: np.random.Generator) -> Turn:
        little, large = sorted(int(n) for n in rng.choice(np.arange(1, 1000), 2, replace=False))
        one, two = (little, large) if rng.random() < 0.5 else (large, little)
        _, question, answer = pick(rng, phrases("chat_choices")).split(" | ")
        numbers = {"little": str(little), "large": str(large), "one": str(one), "two": str(two)}
        said, reply = (fill(rng, self.split, text, **numbers) for text in (question, answer))
        return Turn(said, reply, f"{little} is smaller than {large}.")

    def _story(self, rng: np.random.Generator) -> Turn:
        names = {
            "role": "roles",
            "place": "places",
            "thing": "things",
            "adjective": "adjectives",
            "hero": "first_names",
        }
        given = {slot: pick(rng, pool(name, self.split)) for slot, name in names.items()}
        parts = [pick(rng, phrases("story_beginnings"))]
        middles = phrases("story_middles")
        parts += [middles[i] for i in sorted(pick_some(rng, range(len(middles)), int(rng.integers(2, 6))))]
        parts.append(pick(rng, phrases("story_ends")))
        request = fill(rng, self.split, pick(rng, phrases("story_requests")), **given)
        told = " ".join(fill(rng, self.split, part, **given) for part in parts)
        return Turn(request, told, f"The story is about {given['hero']}.")
