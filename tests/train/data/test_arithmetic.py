"""Every line of every working is true, and the answer is Python's."""

from __future__ import annotations

import re

import pytest

from abyssal.train.data.arithmetic import KINDS, Arithmetic, long_working, plural, steps_of
from abyssal.train.data.example import MODES
from abyssal.train.data.pools import SPLITS, Split, entries, seeded, split_of

MAKER = Arithmetic()
EQUATION = re.compile(r"([\d+*()-][\d +*()-]*) = (-?\d+)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_answers_and_workings(kind: str, mode: str) -> None:
    for index in range(100):
        example = MAKER.generate(seeded("a", "train", index), kind=kind, mode=mode)  # type: ignore[arg-type]
        value = eval(example.meta["expression"])
        asked, answer = example.messages
        assert answer["content"] == f"The answer is: {value}" and value >= 0
        assert example.meta["targets"] == [str(value)]
        equations = EQUATION.findall(answer.get("reasoning_content", ""))
        assert all(eval(left) == int(right) for left, right in equations)
        assert bool(equations) is (mode != "non-think")
        if kind == "sum":
            assert example.meta["expression"] in asked["content"]
        else:
            numbers = re.findall(r"\d+", asked["content"])
            assert all(number in numbers for number in re.findall(r"\d+", example.meta["expression"]))
            assert "{" not in asked["content"]


def test_modes_differ_in_length() -> None:
    for index in range(50):
        lengths = [
            len(MAKER.generate(seeded("a", "train", index), mode=mode).messages[1].get("reasoning_content", ""))
            for mode in MODES
        ]
        assert lengths[0] == 0 < 3 * lengths[1] < lengths[2]


def test_order_of_steps() -> None:
    assert [str(s) for s in steps_of("47 + 6 * 8 - 19")] == ["6 * 8 = 48", "47 + 48 = 95", "95 - 19 = 76"]
    assert [str(s) for s in steps_of("(4 + 3) * 5")] == ["4 + 3 = 7", "7 * 5 = 35"]
    with pytest.raises(ValueError, match="no sum"):
        steps_of("2 ** 3")


def test_long_working_by_hand() -> None:
    assert long_working(steps_of("57 + 8 * 23 - 140")).split("\n") == [
        "Step 1: 8 * 23",
        "20 * 8 = 160",
        "3 * 8 = 24",
        "160 + 24 = 184",
        "So 8 * 23 = 184",
        "Step 2: 57 + 184",
        "7 + 4 = 11, write 1, carry 1",
        "5 + 8 + 1 = 14, write 4, carry 1",
        "0 + 1 + 1 = 2, write 2, carry 0",
        "So 57 + 184 = 241",
        "Step 3: 241 - 140",
        "241 - 100 = 141",
        "141 - 40 = 101",
        "So 241 - 140 = 101",
        "Check:",
        "23 * 8 = 184, right.",
        "241 - 184 = 57, right.",
        "101 + 140 = 241, right.",
    ]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_problems_stay_in_their_part(split: Split, kind: str) -> None:
    made = [Arithmetic(split).generate(seeded("a", split, i), kind=kind).meta["expression"] for i in range(60)]
    assert {split_of(expression) for expression in made} == {split}


def test_plurals() -> None:
    assert [plural(w) for w in ("box", "knife", "toy", "brush", "tomato", "radio", "compass", "lamp", "glass")] == [
        "boxes", "knives", "toys", "brushes", "tomatoes", "radios", "compasses", "lamps", "glasses",
    ]  # fmt: skip
    assert not [w for w in entries("things") if plural(w).endswith(("fs", "yes"))]
