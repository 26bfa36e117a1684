"""Chat: whole sentences, answers that follow from the talk, words of the right part."""

from __future__ import annotations

import re

import pytest

from abyssal.train.data.conversation import KINDS, Chat
from abyssal.train.data.example import MODES
from abyssal.train.data.phrases import phrases
from abyssal.train.data.pools import SPLITS, Split, entries, pool, seeded
from abyssal.train.data.values import table

MAKER = Chat()
EXAMPLES = [MAKER.generate(seeded("chat", "train", index), kind=kind) for kind in KINDS for index in range(60)]


def test_sentences_are_whole() -> None:
    for example in EXAMPLES:
        for message in example.messages:
            text = message["content"]
            assert text == " ".join(text.split()) and "{" not in text
            for sentence in re.split(r"(?<=[.!?])\s+", text):
                assert sentence[0].isupper() or sentence[0].isdigit() or sentence[0] == '"', sentence
            assert text[-1] in ".!?", text
            assert not re.search(r"\ba [aeio]|\ban [^aeiouh]", text), text


def test_what_was_told_is_what_is_answered() -> None:
    for example in EXAMPLES:
        if example.source == "context":
            answer = example.messages[-1]["content"]
            before = " ".join(m["content"] for m in example.messages[:-1]).lower()
            words = [w for w in re.findall(r"[A-Za-z0-9]+", answer) if w[0].isupper() or w.isdigit()][1:]
            assert all(word.lower() in before for word in words)


def test_facts_are_those_of_the_table() -> None:
    pairs = {frozenset((a.lower(), b.lower())) for name in ("capitals", "opposites", "young", "sounds", "next")
             for a, b in table("facts")[name].items()}  # fmt: skip
    for example in EXAMPLES:
        if example.source == "fact":
            said = (example.messages[-2]["content"] + " " + example.messages[-1]["content"]).lower()
            assert any(all(re.search(rf"\b{re.escape(side)}\b", said) for side in pair) for pair in pairs)


def test_comparisons_are_true() -> None:
    for example in EXAMPLES:
        if example.source == "larger":
            answer = example.messages[-1]["content"]
            one, two = map(int, re.findall(r"\d+", answer))
            assert (one > two) is ("larger" in answer)


def test_modes_and_kinds() -> None:
    assert {e.source for e in (MAKER.generate(seeded("chat", "train", i)) for i in range(80))} == set(KINDS)
    for index in range(20):
        lengths = []
        for mode in MODES:
            example = MAKER.generate(seeded("chat", "train", index), mode=mode)
            lengths.append(sum(len(m.get("reasoning_content", "")) for m in example.messages))
        assert lengths[0] == 0 < lengths[1] < lengths[2]


@pytest.mark.parametrize("split", SPLITS)
def test_names_stay_in_their_part(split: Split) -> None:
    other = "held_out" if split == "train" else "train"
    elsewhere = " ".join((*entries("cities"), *table("facts")["capitals"].values()))  # San Diego, Sofia
    banned = set(pool("first_names", other)) - set(elsewhere.split())
    for index in range(150):
        example = Chat(split).generate(seeded("chat", split, index))
        text = " ".join(m["content"] for m in example.messages)
        assert not set(re.findall(r"\w+", text)) & banned


def test_every_row_can_be_read() -> None:
    assert all(row.count(" | ") == 3 for row in phrases("chat_context"))
    assert all(row.count(" | ") == 2 and row.split(" | ")[0] in table("facts") for row in phrases("chat_facts"))
    assert all(row.count(" | ") == 1 for row in (*phrases("small_talk"), *phrases("chat_members")))


def test_the_same_seed_gives_the_same() -> None:
    assert MAKER.generate(seeded("chat", "train", 3)) == MAKER.generate(seeded("chat", "train", 3))
