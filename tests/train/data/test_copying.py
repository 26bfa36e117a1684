"""Copies are copies, and what a passage marks can be known from what stands before."""

from __future__ import annotations

import itertools
import re

import pytest

from abyssal.train.data.copying import KINDS, PASSAGES, Copying
from abyssal.train.data.example import MODES
from abyssal.train.data.pools import SPLITS, Split, seeded, split_of

MAKER = Copying()


@pytest.mark.parametrize("kind", KINDS)
def test_answers(kind: str) -> None:
    for index in range(40):
        request, answer = (m["content"] for m in MAKER.generate(seeded("c", "train", index), kind=kind).messages)
        words = re.split(r",? ", answer)
        if kind in ("verbatim", "code"):
            assert answer in request
        elif kind == "upper":
            assert answer.lower() in request.lower() and answer.isupper()
        elif kind == "spell":
            assert answer.replace(" ", "") in request and all(len(letter) == 1 for letter in words)
        elif kind == "reverse":
            assert request.endswith((", ".join(words[::-1]), " ".join(words[::-1])))
        else:
            assert words == sorted(words) and all(word in request for word in words)


def test_every_kind_comes() -> None:
    made = {MAKER.generate(seeded("c", "train", index)).source for index in range(100)}
    assert made == set(KINDS)


@pytest.mark.parametrize("kind", PASSAGES)
def test_marked_words_follow_from_the_text_before(kind: str) -> None:
    """Each has stood before, behind the same word."""
    for index in range(40):
        passage = MAKER.passage(seeded("p", "train", index), kind=kind)
        assert passage.answers
        for start, end in passage.answers:
            before = passage.text[:start].split()
            assert (before[-1], passage.text[start:end]) in itertools.pairwise(before)


@pytest.mark.parametrize("kind", ["pairs", "words"])
def test_many_names_are_asked_for_far_behind(kind: str) -> None:
    near, far = Copying(), Copying(far=256)
    gaps = {}
    for name, maker in (("near", near), ("far", far)):
        found = []
        for index in range(20):
            words = maker.passage(seeded("far", "train", index), kind=kind).text.split()
            last: dict[str, int] = {}
            for place, word in enumerate(words[::2]):
                found += [place - last[word]] if word in last else []
                last[word] = place
        gaps[name] = sum(found) / len(found)
    assert gaps["far"] > 2 * gaps["near"]


@pytest.mark.parametrize("split", SPLITS)
def test_codes_stay_in_their_part(split: Split) -> None:
    maker = Copying(split)
    codes = [maker.generate(seeded("c", split, i), kind="code").messages[1]["content"] for i in range(50)]
    assert {split_of(code) for code in codes} == {split}


@pytest.mark.parametrize("kind", KINDS)
def test_modes_differ_in_length(kind: str) -> None:
    made = [MAKER.generate(seeded("c", "train", 0), kind=kind, mode=mode).messages[1] for mode in MODES]
    lengths = [len(message.get("reasoning_content", "")) for message in made]
    assert lengths[0] == 0 < lengths[1] < lengths[2]
    assert len({message["content"] for message in made}) == 1


def test_the_same_seed_gives_the_same() -> None:
    assert MAKER.generate(seeded("c", "train", 1)) == MAKER.generate(seeded("c", "train", 1))
    assert MAKER.passage(seeded("c", "train", 1)) == MAKER.passage(seeded("c", "train", 1))
