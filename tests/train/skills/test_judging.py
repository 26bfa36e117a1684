"""Verdicts on hand-made replies: right, wrong, malformed, none, cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from abyssal.train.data.conversation import Chat
from abyssal.train.data.example import Example, assistant, user
from abyssal.train.skills import arithmetic, retrieval
from abyssal.train.skills.asking import Reply
from abyssal.train.skills.chat import right, signs_of
from abyssal.train.skills.retrieval import Question
from abyssal.train.skills.tools import same, tells, verdict

CALL = {"name": "send_mail", "arguments": {"to": "Ada", "copies": 1}}
OTHER = {"name": "send_mail", "arguments": {"to": "Bob", "copies": 1}}
ADA, BOB = '{"copies": 1, "to": "Ada"}', '{"to": "Bob", "copies": 1}'


def called(*calls: tuple[str, str], **more: Any) -> Reply:
    return Reply(calls=list(calls), finish="tool_calls", **more)


@pytest.mark.parametrize(
    ("expected", "reply", "outcome"),
    [
        ([CALL], called(("send_mail", ADA)), "right"),
        ([CALL], called(("send_mail", ADA), content="Sure."), "right"),
        ([CALL], called(("send_mail", BOB)), "wrong arguments"),
        ([CALL], called(("send_mail", '{"to": "Ada"}')), "wrong arguments"),
        ([CALL], called(("send_mail", '{"to": "Ada", "copies": 1, "now": true}')), "wrong arguments"),
        ([CALL], called(("send_mail", '{"to": "Ada", "copies": "1"}')), "wrong arguments"),
        ([CALL], called(("send_fax", ADA)), "wrong tool"),
        ([CALL], called(("send_mail", ADA), ("send_mail", ADA)), "wrong number"),
        ([CALL], Reply("I send it.", finish="stop"), "none"),
        ([CALL], Reply("I send", finish="length"), "unfinished"),
        ([CALL], Reply("", "I think", repairs=["truncated_reasoning"], finish="length"), "unfinished"),
        ([CALL], called(("send_mail", ADA), repairs=["loose_call"]), "malformed"),
        ([CALL], Reply(repairs=["incomplete_call"], finish="stop"), "malformed"),
        ([CALL], Reply(repairs=["incomplete_call"], finish="length"), "unfinished"),
        ([CALL], Reply(repairs=["leaked_token"], finish="length"), "unfinished"),
        ([CALL], Reply(repairs=["incomplete_call", "rejected_call"], finish="length"), "malformed"),
        ([CALL], called(("send_mail", ADA), repairs=["truncated_reasoning"]), "unfinished"),
        ([CALL, OTHER], called(("send_mail", BOB), ("send_mail", ADA)), "right"),
        ([CALL, OTHER], called(("send_mail", ADA), ("send_mail", ADA)), "wrong arguments"),
        ([], Reply("I cannot.", finish="stop"), "right"),
        ([], called(("send_mail", ADA)), "uncalled for"),
    ],
)
def test_tool_turns(expected: list[dict[str, Any]], reply: Reply, outcome: str) -> None:
    assert verdict(expected, reply) == outcome


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (5, 5.0, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        ("1", 1, False),
        ([1, {"a": None}], [1, {"a": None}], True),
        ([1, True], [1, 1], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([1], [1, 2], False),
    ],
)
def test_equal_values(one: Any, other: Any, equal: bool) -> None:
    assert same(one, other) is equal and same(other, one) is equal


def test_an_answer_that_tells_the_result() -> None:
    result = {"price": 4.5, "open": True, "names": ["a", "b"], "ok": True}
    assert tells(result, "The price is 4.5, the open is yes and the names is a, b.")
    assert not tells(result, "The price is 4, the open is yes and the names is a, b.")


def test_retrieval_answers() -> None:
    item = Question("x", "The code of the red barn cook is 1234. The red barn maid has 77-a.", "?", "1234", {})
    outcomes = {
        "1234": "right",
        " 1234\n": "right",
        "77-a": "elsewhere",
        "1235": "invented",
        "The code is 1234.": "invented",
        "": "unfinished",
    }
    assert {said: retrieval.outcome_of(item, Reply(said, finish="stop")) for said in outcomes} == outcomes
    assert retrieval.outcome_of(item, Reply("1234", finish="length")) == "unfinished"
    assert retrieval.outcome_of(item, Reply("1234", repairs=["leaked_token"], finish="stop")) == "unfinished"


def test_arithmetic_answers() -> None:
    outcomes = {
        "The answer is: 42": "right",
        "It is easy.\nThe answer is: 42": "right",
        "The answer is: 420": "wrong",
        "The answer is: -42": "wrong",
        "The answer is: 42.": "unfinished",
        "42": "unfinished",
        "": "unfinished",
    }
    assert {said: arithmetic.outcome_of("42", Reply(said, finish="stop")) for said in outcomes} == outcomes
    assert arithmetic.outcome_of("42", Reply("The answer is: 42", finish="length")) == "unfinished"


KNOWN = {"the", "cat", "sat", "on", "a", "mat", "and", "it's", "fine"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("The cat sat on a mat.", set()),
        ("The cat sat on a mat, and it's fine!", set()),
        ("7 is fine.", {"known_words"}),
        ("the cat sat.", {"capital"}),
        ("The cat sat", {"full_stop"}),
        ("The dog sat.", {"known_words"}),
        ("The Ada sat.", set()),  # the user has said it
        ("The cat sat <think> on a mat.", {"no_marks", "known_words"}),
        ("The cat sat on the cat sat on the cat sat on a mat.", {"no_loop"}),
        ("The cat sat on the cat sat on a mat.", set()),
        ("", {"capital", "full_stop"}),
    ],
)
def test_signs_of_grammar(text: str, wrong: set[str]) -> None:
    signs = signs_of(Reply(text, finish="stop"), KNOWN, "I am Ada.")
    assert {sign for sign, good in signs.items() if not good} == wrong


def test_a_reply_that_did_not_end() -> None:
    signs = signs_of(Reply("The cat sat.", finish="length", repairs=["leaked_token"]), KNOWN, "")
    assert {sign for sign, good in signs.items() if not good} == {"ended", "no_marks"}


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ("Two fruits are pears and plums.", True),
        ("Yes: plums and apples.", True),
        ("Apples and grapes.", True),
        ("Pears.", False),
        ("Pears and pears.", False),
        ("Pears, plums and grapes.", False),
        ("Cats and plums.", False),
    ],
)
def test_members_of_a_group(said: str, good: bool) -> None:
    asked = Example([user("Name two fruits."), assistant("Plums and pears.")], "conversation", source="members")
    assert right(asked, Reply(said, finish="stop")) is good


def test_every_own_reply_is_right() -> None:
    """What the generator would have said passes, and is grammatical; stories are not compared."""
    for kind in ("talk", "fact", "context", "larger", "members", "story"):
        for seed in range(40):
            example = Chat("held_out").generate(np.random.default_rng(seed), kind=kind, mode="non-think")
            reply = Reply(example.messages[-1]["content"], finish="stop")
            assert right(example, reply) is (None if kind == "story" else True)
