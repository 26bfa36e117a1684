"""The parser: the golden cases, the table of encoding.md 5, and anything at all, cut anywhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.encoding.literals import DSML, EOS, SPECIAL_TOKENS
from abyssal.encoding.messages import Message, ToolCall
from abyssal.encoding.parse import Call, End, Event, Parsed, Parser, Reasoning, Repair, Text, parse
from abyssal.encoding.render import prompt_text, render

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "parse.json").read_text(encoding="utf-8"))
TOOLS = [
    {"name": "f", "parameters": {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a"]}},
    {"name": "g", "parameters": {}},
]


def parameter(key: str, value: str, kind: str | None = "true") -> str:
    mark = f' string="{kind}"' if kind else ""
    return f'<{DSML}parameter name="{key}"{mark}>{value}</{DSML}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<{DSML}invoke name="{name}">\n{"".join(parameters)}</{DSML}invoke>\n'


def block(*calls: str) -> str:
    return f"\n\n<{DSML}tool_calls>\n{''.join(calls)}</{DSML}tool_calls>"


def events_of(pieces: list[str], thinking: bool, tools: Any = None) -> list[Event]:
    """Events with neighbouring texts joined."""
    parser = Parser(thinking=thinking, tools=tools)
    events: list[Event] = []
    for event in [*(e for piece in pieces for e in parser.feed(piece)), *parser.finish()]:
        last = events[-1] if events else None
        if isinstance(event, Text) and isinstance(last, Text):
            events[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            events[-1] = Reasoning(last.text + event.text)
        else:
            events.append(event)
    return events


def names(parsed: Parsed) -> list[str]:
    return [repair.name for repair in parsed.repairs]


@pytest.mark.parametrize("case", GOLDEN, ids=[c["name"] for c in GOLDEN])
def test_golden_completions_at_every_split(case: dict[str, Any]) -> None:
    text, thinking = case["completion"], case["thinking_mode"] == "thinking"
    parsed = parse(text, thinking=thinking)
    assert parsed.message() == case["expected_message"] and not parsed.repairs and parsed.complete
    whole = events_of([text], thinking)
    assert events_of(list(text), thinking) == whole
    for at in range(1, len(text)):
        assert events_of([text[:at], text[at:]], thinking) == whole


GOOD = invoke("f", parameter("a", "x"), parameter("n", "3", "false"))
CALL = ("f", '{"a": "x", "n": 3}')


@pytest.mark.parametrize(
    ("completion", "content", "calls", "repairs"),
    [
        (f"hi{block(GOOD)}{EOS}", "hi", [CALL], []),
        (f"hi{block(GOOD, invoke('g'))}{EOS}", "hi", [CALL, ("g", "{}")], []),
        # near misses: the call is recovered
        (f"hi\n\n{GOOD}{EOS}", "hi", [CALL], ["loose_call"]),
        (f"hi{block(GOOD).replace('tool_calls', 'toolcalls')}{EOS}", "hi", [CALL], ["loose_call"]),
        (f"hi{block(GOOD).replace('tool_calls', 'function_calls')}{EOS}", "hi", [CALL], ["loose_call"]),
        (f"hi\n<{DSML}tool_calls>{GOOD}\n\n </{DSML}tool_calls>\n{EOS}", "hi\n", [CALL], []),
        (f"hi{block(GOOD).replace(f'<{DSML}', f'< {DSML} ')}{EOS}", "hi", [CALL], ["loose_call"]),
        (f"hi{block(GOOD)[: -len(f'</{DSML}tool_calls>')]}{EOS}", "hi", [CALL], ["loose_call"]),
        # arguments
        (block(invoke("f", parameter("a", "x"), parameter("n", "three", "false"))), "",
         [("f", '{"a": "x", "n": "three"}')], ["repaired_argument"]),
        (block(invoke("f", parameter("a", "x"), parameter("n", "NaN", "false"))), "",
         [("f", '{"a": "x", "n": "NaN"}')], ["repaired_argument"]),
        (block(invoke("f", parameter("a", "x", None))), "", [("f", '{"a": "x"}')], ["repaired_argument"]),
        (block(invoke("f", parameter("a", "x"), parameter("a", "y"))), "", [("f", '{"a": "y"}')],
         ["duplicate_parameter"]),
        (block(invoke("f", "so: ", parameter("a", "x"))), "", [("f", '{"a": "x"}')], ["loose_call"]),
        # no calls
        (block(invoke("h", parameter("a", "x"))), None, [], ["rejected_call"]),
        (block(invoke("f", parameter("n", "3", "false"))), None, [], ["rejected_call"]),
        (f"hi{block(GOOD)[:-60]}", "hi", [], ["incomplete_call"]),
        (f"hi{block(GOOD)[:-60]}{EOS}", "hi", [], ["incomplete_call"]),
        # prose
        (f"write `<{DSML}tool_calls>` so", f"write `<{DSML}tool_calls>` so", [], []),
        (f"```\n{GOOD}```\nlike this", f"```\n{GOOD}```\nlike this", [], []),
        (f"``` open fence{block(GOOD)}", f"``` open fence{block(GOOD)}", [], []),
        ("ascii <|DSML|tool_calls> is prose", "ascii <|DSML|tool_calls> is prose", [], []),
        (f"an odd ` tick{block(GOOD)}", "an odd ` tick", [CALL], []),
        # special tokens in content
        ("a<｜User｜>b<think>c</think>d", "abcd", [], ["leaked_token"] * 3),
        (f"a</{DSML}tool_calls>b{DSML}c", "abc", [], ["leaked_token"] * 2),
        (f"end{EOS}more{EOS}", "end", [], ["text_after_end"]),
        ("a < b and c ｜ d <", "a < b and c ｜ d <", [], []),
        ("a\n\n\n", "a\n\n\n", [], []),
    ],
)  # fmt: skip
def test_repairs(completion: str, content: str | None, calls: list[tuple[str, str]], repairs: list[str]) -> None:
    parsed = parse(completion, thinking=False, tools=TOOLS)
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == calls
    assert names(parsed) == repairs
    assert parsed.complete == (EOS in completion)
    if content is None:  # a rejected call becomes text without its marks
        assert DSML not in parsed.content and "invoke name=" in parsed.content
    else:
        assert parsed.content == content
    for at in range(len(completion)):
        assert events_of([completion[:at], completion[at:]], False, TOOLS) == events_of([completion], False, TOOLS)


def test_reasoning_that_is_never_closed() -> None:
    for text in ("so", f"so{EOS}", "so\n\n`<b"):
        parsed = parse(text, thinking=True)
        assert parsed.reasoning == text.replace(EOS, "") and not parsed.content
        assert names(parsed) == ["truncated_reasoning"]


def test_calls_are_refused_where_tools_are_not_to_be_used() -> None:
    parsed = parse(block(GOOD), thinking=False, tools=TOOLS, allow_calls=False)
    assert not parsed.tool_calls and names(parsed) == ["rejected_call"]


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = Parser(thinking=True)
    assert parser.feed("thin") == [Reasoning("thin")]
    assert parser.feed("k</thi") == [Reasoning("k")]
    assert parser.feed("nk>Hel") == [Text("Hel")]
    assert parser.feed("lo <") == [Text("lo ")]
    assert parser.feed("b>") == [Text("<b>")]
    assert parser.feed("\n\n") == []
    assert parser.feed("x") == [Text("\n\nx")]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda text: not any(token in text for token in SPECIAL_TOKENS) and "`" not in text and "｜" not in text
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
KEYS = TEXTS.filter(lambda key: '"' not in key)
NAMES = st.text("abcxyz_-.0123", min_size=1, max_size=12)


@settings(deadline=None, max_examples=120)
@given(
    TEXTS, TEXTS, st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=4)), max_size=3), st.booleans(),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_what_is_rendered_is_parsed_back(
    content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool, rng: random.Random
) -> None:
    """Over Unicode, nested arguments, quotes and markup inside strings."""
    made = tuple(ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls)
    answer = Message("assistant", content, reasoning=reasoning, tool_calls=made)
    question = Message("user", "q")
    before = prompt_text(render([question], thinking=thinking))
    text = prompt_text(render([question, answer], thinking=thinking))
    assert text.startswith(before)
    completion = text[len(before) :]
    pieces, at = [], 0
    while at < len(completion):
        step = rng.randint(1, 9)
        pieces.append(completion[at : at + step])
        at += step
    events = events_of(pieces, thinking)
    assert events == events_of([completion], thinking)
    assert not [event for event in events if isinstance(event, Repair)]
    assert "".join(e.text for e in events if isinstance(e, Text)) == content
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == (reasoning if thinking else "")
    got = [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, Call)]
    assert got == [(name, arguments) for name, arguments in calls]
    assert events[-1] == End(True)


FRAGMENTS = [
    "<", ">", "</", "｜", "DSML", DSML, f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", f'<{DSML}invoke name="f">',
    f"</{DSML}invoke>", f'<{DSML}parameter name="a" string="true">', f'<{DSML}parameter name="b" string="false">',
    f"</{DSML}parameter>", "\n", "\n\n", "`", "```", " ", "x", "</think>", "<think>", EOS, "<｜User｜>", "1",
    f"<{DSML}toolcalls>", f'< {DSML}invoke name="f" >', '"', "=", f"<{DSML}foo>", "text", GOOD, block(GOOD),
]  # fmt: skip


def mutated(rng: random.Random) -> str:
    """Random fragments, or a good completion with a few characters cut, doubled or swapped."""
    if rng.random() < 0.5:
        return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 12)))
    text = list(f"why</think>so{block(GOOD, invoke('g'))}{EOS}")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        what = rng.randrange(3)
        if what == 0:
            del text[at : at + rng.randint(1, 12)]
        elif what == 1:
            text[at:at] = rng.choice(FRAGMENTS)
        else:
            other = rng.randrange(len(text))
            text[at], text[other] = text[other], text[at]
        text = text or ["x"]
    return "".join(text)


@pytest.mark.parametrize("seed", range(4))
def test_any_completion_cut_anywhere_gives_the_same_events(seed: int) -> None:
    """25,000 random and mutated completions each: no exception, no sentinel in text, no invented call."""
    rng = random.Random(seed)
    for _ in range(25_000):
        text, thinking = mutated(rng), rng.random() < 0.5
        whole = events_of([text], thinking, TOOLS)
        at = rng.randint(0, len(text))
        cut = events_of(list(text) if rng.random() < 0.1 else [text[:at], text[at:]], thinking, TOOLS)
        assert cut == whole, text
        content = "".join(e.text for e in whole if isinstance(e, Text))
        assert "`" in text or not any(token in content for token in SPECIAL_TOKENS), text
        for call in (e for e in whole if isinstance(e, Call)):
            assert call.name in ("f", "g") and f'"{call.name}"' in text
            assert call.name == "g" or "a" in json.loads(call.arguments)
        assert sum(isinstance(e, End) for e in whole) == 1


def test_long_arguments_take_linear_time() -> None:
    """A file of 400 KB as an argument, four characters a piece: the parser looks at each character a few times."""
    import sys

    text = block(invoke("f", parameter("a", "if a < b and c > d: print('x')\n" * 13_000)))
    parser = Parser(thinking=False, tools=TOOLS)
    lines = 0

    def count(*_: Any) -> Any:
        nonlocal lines
        lines += 1
        return count

    sys.settrace(count)
    try:
        events = [e for at in range(0, len(text), 4) for e in parser.feed(text[at : at + 4])]
    finally:
        sys.settrace(None)
    assert [type(e) for e in [*events, *parser.finish()]] == [Call, End]
    assert lines < 40 * len(text) / 4
