"""Text repeated as it is, reversed, spelt or sorted; and running text whose later words follow from earlier ones."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from abyssal.train.data.example import MODES, Example, Passage, ThinkingMode, assistant, user
from abyssal.train.data.phrases import fill, phrases
from abyssal.train.data.pools import Split, draw, pick, pick_some, wide_pool

KINDS = ("verbatim", "reverse", "spell", "upper", "code", "sort")
THOUGHTS = {
    "verbatim": "I write the text once more and change nothing.",
    "reverse": "I begin with the last word and go back to the first.",
    "spell": "I write one letter after the other.",
    "upper": "I write the same words in capital letters.",
    "code": "I copy the code, sign by sign.",
    "sort": "I look at the first letters of the words and put them in order.",
}
PASSAGES = ("repeat", "induction", "pairs", "words")
LISTS = ("things", "adjectives", "places", "roles", "cities")
LONGEST = 60  # words
MOST_NAMES = 48  # of a passage of pairs
ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Copying:
    """The generator.

    Args:
        split: part of the word pools; codes are cut by their digest.
        kinds: of conversations, to choose from.
        passages: kinds of running text, to choose from.
        longest: words of what is copied, at most.
        far: words of a passage of pairs, at most: where there are many names, most are asked for far behind their
            last place.
        modes: thinking modes to choose from.
    """

    split: Split = "train"
    kinds: Sequence[str] = KINDS
    passages: Sequence[str] = PASSAGES
    longest: int = LONGEST
    far: int = LONGEST
    modes: Sequence[ThinkingMode] = MODES

    def generate(
        self, rng: np.random.Generator, *, kind: str | None = None, mode: ThinkingMode | None = None
    ) -> Example:
        """A request to copy, and the copy.

        Args:
            rng: the only source of chance.
            kind: one of `KINDS`; otherwise any of the generator's.
            mode: what is thought: nothing, what is to be done, or that and a first try.
        """
        chosen = kind if kind is not None else pick(rng, self.kinds)
        chosen_mode = mode if mode is not None else pick(rng, self.modes)
        if chosen == "verbatim":
            text = answer = self._prose(rng)
        elif chosen == "code":
            text = answer = self._code(rng)
        elif chosen == "spell":
            text = pick(rng, [word for word in _single(LISTS, self.split) if word.islower()])
            answer = " ".join(text)
        else:
            words = self._words(rng, int(rng.integers(3, min(self.longest, 12) + 1)))
            text = ", ".join(words) if rng.random() < 0.5 and chosen != "upper" else " ".join(words)
            separator = ", " if ", " in text else " "
            changed = {"reverse": words[::-1], "sort": sorted(words), "upper": [w.upper() for w in words]}[chosen]
            answer = separator.join(changed)
        request = pick(rng, _requests(chosen)).replace("{text}", text)
        thought = "" if chosen_mode == "non-think" else THOUGHTS[chosen]
        if chosen_mode == "think-max":
            thought += f"\nMy try: {answer}\nI compare it with the text. It is right."
        messages = [user(request), assistant(answer, thought)]
        return Example(messages, "copying", chosen_mode, source=chosen, meta={"targets": [answer]})

    def passage(self, rng: np.random.Generator, *, kind: str | None = None, words: int | None = None) -> Passage:
        """Running text in which later words follow from earlier ones.

        Args:
            rng: the only source of chance.
            kind: "repeat": words in random order, twice; "induction": a short list that comes again and again
                between others; "pairs": words with the number that belongs to each, in random order, many times;
                "words": the same with a word instead of the number.
            words: length, about.
        """
        chosen = kind if kind is not None else pick(rng, self.passages)
        longest = self.far if chosen in ("pairs", "words") else self.longest
        count = words or int(rng.integers(8, longest + 1))
        if chosen == "repeat":
            once = self._words(rng, count)
            return self._passage(chosen, [(w, False) for w in once] + [(w, place > 0) for place, w in enumerate(once)])
        if chosen == "induction":
            motif = self._words(rng, int(rng.integers(3, 7)))
            parts: list[tuple[str, bool]] = []
            times = 0
            while times < 2 or len(parts) < count:
                parts += [(w, False) for w in self._words(rng, int(rng.integers(2, 9))) if w not in motif]
                parts += [(w, times > 0 and place > 0) for place, w in enumerate(motif)]
                times += 1
            return self._passage(chosen, parts)
        names = self._words(rng, max(2, min(count // 6, MOST_NAMES)))
        if chosen == "words":
            values = dict(zip(names, self._words(rng, len(names)), strict=True))
        else:
            values = {name: str(int(rng.integers(100, 1000))) for name in names}
        known: set[str] = set()
        parts = []
        for _ in range(max(count // 2, 2)):
            name = pick(rng, names)
            parts += [(name, False), (values[name], name in known)]
            known.add(name)
        return self._passage(chosen, parts)

    def _passage(self, kind: str, parts: Sequence[tuple[str, bool]]) -> Passage:
        text = ""
        answers = []
        for word, follows in parts:
            text += word
            if follows:
                answers.append((len(text) - len(word), len(text)))
            text += " "
        return Passage(text.rstrip(), tuple(answers), "copying", {"kind": kind})

    def _words(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different single words of one list or of all."""
        lists = LISTS if count > 12 or rng.random() < 0.3 else (pick(rng, LISTS),)
        return pick_some(rng, _single(lists, self.split), count)

    def _prose(self, rng: np.random.Generator) -> str:
        text = fill(rng, self.split, pick(rng, phrases("filler")))
        while rng.random() < 0.6:
            more = fill(rng, self.split, pick(rng, phrases("filler")))
            if len(f"{text} {more}".split()) > self.longest:
                break
            text += (" " if rng.random() < 0.8 else "\n") + more
        return text

    def _code(self, rng: np.random.Generator) -> str:
        def one() -> str:
            groups = int(rng.integers(1, 5))
            length = int(rng.integers(2, 7))
            letters = pick(rng, (ALPHABET, string.digits, "0123456789abcdef", string.ascii_uppercase + string.digits))
            text = ["".join(pick(rng, letters) for _ in range(length)) for _ in range(groups)]
            return pick(rng, "-_./:").join(text)

        return draw(self.split, one)


@cache
def _single(lists: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """Entries of one word."""
    return tuple(dict.fromkeys(word for name in lists for word in wide_pool(name, split) if " " not in word))


@cache
def _requests(kind: str) -> tuple[str, ...]:
    rows = (line.split(" | ", 1) for line in phrases("copying"))
    return tuple(request.replace("\\n", "\n") for name, request in rows if name == kind)
