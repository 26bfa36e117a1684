"""Haystacks: the length asked for, facts where they should be, confusable keys, right answers."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from abyssal.train.data.example import MODES
from abyssal.train.data.pools import pool, seeded
from abyssal.train.data.retrieval import KINDS, SMALLEST, Kind, Retrieval, sentences_of


def count(text: str) -> int:
    """Words, marks and digits one by one: about what a small tokenizer makes of them."""
    return len(re.findall(r"[^\W\d]+|\d|[^\w\s]|\n", text))


MAKER = Retrieval(count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [SMALLEST, 200, 1000, 8000])
@pytest.mark.parametrize("questions", [1, 4])
def test_length_and_answers(kind: Kind, length: int, questions: int) -> None:
    for index in range(8):
        rng = seeded("test", "train", index)
        example = MAKER.generate(rng, kind=kind, length=length, questions=questions)
        whole = "\n".join(m["content"] for m in example.messages)
        assert count(whole) <= length
        assert count(whole) >= length - 60, "to within a sentence and the template's share"
        hay = example.messages[0]["content"].rsplit("\n\n", 1)[0]
        targets = example.meta["targets"]
        assert [m["content"] for m in example.messages[1::2]] == targets
        for key, target, question in zip(example.meta["keys"], targets, example.messages[::2], strict=True):
            assert key in question["content"].rsplit("\n\n", 1)[-1]
            # the key stands once, and its value in the same sentence or line
            found = [s for s in re.split(r"(?<=[.]) |\n", hay) if key.lower() in s.lower()]
            assert len(found) == 1 and target in found[0]


def test_keys_share_prefixes() -> None:
    """Every asked key of a single needle has three others with the same first two words."""
    for index in range(20):
        example = MAKER.generate(seeded("test", "train", index), kind="single", length=700)
        (key, *_) = example.meta["keys"]
        prefix = " ".join(key.split()[:2])
        hay = example.messages[0]["content"].rsplit("\n\n", 1)[0]
        assert len(re.findall(rf"{prefix} \w+", hay, flags=re.I)) == 4


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["single", "multi_key"])
def test_depth(kind: Kind, depth: float) -> None:
    for index in range(5):
        example = MAKER.generate(seeded("test", "train", index), kind=kind, length=4000, depth=depth, questions=1)
        (distance,) = example.meta["distances"]
        assert abs(1 - distance / example.meta["tokens"] - depth) < 0.03


def test_half_near_and_half_far() -> None:
    distances = [
        MAKER.generate(seeded("test", "train", index), kind="single", length=2000, questions=1).meta["distances"][0]
        for index in range(200)
    ]
    near = np.mean(np.array(distances) <= MAKER.near + 60)
    assert 0.38 < near < 0.68  # far ones may fall near the end by chance; three standard deviations
    assert max(distances) > 1500


def test_passages_mark_their_answers() -> None:
    for index in range(30):
        passage = MAKER.passage(seeded("test", "train", index))
        assert [passage.text[a:b] for a, b in passage.answers] == passage.meta["targets"]


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_ask_every_fact_so_often(kind: Kind) -> None:
    shares = {}
    for rounds in (1, 3):
        maker = Retrieval(count, rounds=rounds)
        learned = total = 0
        for index in range(20):
            passage = maker.passage(seeded("rounds", "train", index), kind=kind, length=400, questions=8)
            assert [passage.text[a:b] for a, b in passage.answers] == passage.meta["targets"]
            asked = Counter(passage.meta["keys"])
            assert set(asked.values()) == {rounds}
            hay = passage.text.rsplit("\n\n", 1)[0].lower()
            assert all(hay.count(key.lower()) == 1 for key in asked), "a fact is told once"
            learned += sum(count(target) for target in passage.meta["targets"])
            total += count(passage.text)
        shares[rounds] = learned / total
    assert shares[3] > 1.5 * shares[1], "more of the text is learnt from"


def test_the_same_seed_gives_the_same() -> None:
    one, two = (MAKER.generate(seeded("retrieval", "train", 5)) for _ in range(2))
    assert one == two != MAKER.generate(seeded("retrieval", "train", 6))


def test_held_out_keys_are_never_trained_on() -> None:
    maker = Retrieval(count, split="held_out")
    for index in range(20):
        for key in maker.generate(seeded("test", "held_out", index)).meta["keys"]:
            words = key.split()
            assert words[-1] in pool("roles", "held_out") and words[0] in pool("adjectives", "held_out")


def test_filler_of_the_callers_own() -> None:
    prose = sentences_of("One sentence stands here. Another follows it!\nA third e.g. this one.")
    assert prose == ["One sentence stands here.", "Another follows it!", "A third e.g. this one."]
    example = Retrieval(count, filler=prose).generate(seeded("test", "train", 0), kind="single", length=300)
    rest = example.messages[0]["content"]
    assert rest.count("Another follows it!") >= 3
    assert re.search(r"One sentence stands here\.\s(The .*? |For .*? |Remember .*? |It was .*? )?Another", rest)


@pytest.mark.parametrize("kind", KINDS)
def test_thinking_finds_the_fact(kind: Kind) -> None:
    for index in range(20):
        lengths = []
        for mode in MODES:
            example = MAKER.generate(seeded("test", "train", index), kind=kind, mode=mode, length=400)
            thought = example.messages[1].get("reasoning_content", "")
            lengths.append(len(thought))
            assert (mode == "non-think") or (
                len(example.messages) == 2 and example.meta["targets"][0] in thought and thought.count("\n") <= 1
            )
        assert lengths[0] == 0 < lengths[1] < lengths[2]


def test_too_short() -> None:
    with pytest.raises(ValueError, match="no room"):
        MAKER.generate(seeded("test", "train", 0), length=SMALLEST - 1)


def test_a_shared_text() -> None:
    """Every asked fact stands where it should, with its confusable ones; all kinds lie in one text."""
    depths: dict[Kind, list[float]] = {"single": [0.0, 0.5, 1.0], "multi_key": [0.2, 0.9], "key_value": [0.4]}
    length = 9000
    hay = MAKER.shared(seeded("test", "held_out", 0), length, depths)
    assert length - 60 <= hay.tokens <= length
    wanted = [depth for places in depths.values() for depth in places]
    for fact, question, distance, depth in zip(hay.asked, hay.questions, hay.distances, wanted, strict=True):
        assert fact.sentence in hay.text and fact.key in question
        assert abs(1 - distance / hay.tokens - depth) < 0.03
        assert len(re.findall(rf"{re.escape(fact.key)}\b", hay.text, flags=re.I)) == 1
    for fact in hay.asked[:3]:
        prefix = " ".join(fact.key.split()[:2])
        assert len(re.findall(rf"{prefix} \w+", hay.text, flags=re.I)) >= 4
    line = hay.asked[-1].sentence
    assert line in hay.text.split("\n"), "an entry of a list has a line of its own"


def test_a_shared_list_has_no_prose() -> None:
    hay = MAKER.shared(seeded("test", "held_out", 1), 3000, {"key_value": [0.1, 0.8]})
    assert all(fact.sentence in hay.text.split("\n") for fact in hay.asked)
    assert hay.tokens > 2000 and "." not in hay.text


def test_a_shared_text_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="30 tokens have no room for 3 facts"):
        MAKER.shared(seeded("test", "train", 0), 30, {"single": [0.0, 0.5, 1.0]})
