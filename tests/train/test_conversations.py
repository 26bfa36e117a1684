"""Samples of conversations: what the serving encoder renders, cut where it rewrites history."""

from __future__ import annotations

from typing import Any

import pytest

from abyssal.cli.models import bundled_folder
from abyssal.encoding.messages import Conversation
from abyssal.encoding.render import render
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.train.conversations import MODES, samples_of
from abyssal.train.data.example import Example, assistant, user
from abyssal.train.data.mixture import DOMAINS, Mixture
from abyssal.train.data.pools import seeded
from abyssal.train.data.tool_use import ToolUse
from abyssal.train.packing import Sample

TOKENIZER = Tokenizer(bundled_folder())
CALL: dict[str, Any] = {
    "id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Oslo"}'},
}  # fmt: skip
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, keep_special=True)


def learnt(sample: Sample) -> list[str]:
    """The runs of tokens that are to be learnt."""
    assert sample.learned is not None
    runs: list[list[int]] = []
    for before, token, learned in zip(
        [False, *sample.learned[:-1]], sample.ids.tolist(), sample.learned.tolist(), strict=True
    ):
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(token)
    return [text(run) for run in runs]


def two_turns(mode: Any, tools: Any = ()) -> Example:
    thought = "" if mode == "non-think" else "I think."
    messages = [user("One?"), assistant("Two.", thought), user("Three?"), assistant("Four.", thought)]
    return Example(messages, "conversation", mode, list(tools))


def test_without_thinking_all_turns_are_one_sample() -> None:
    (sample,) = samples_of(two_turns("non-think"), TOKENIZER)
    assert learnt(sample) == ["Two.<｜end▁of▁sentence｜>", "Four.<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize("mode", ["think-high", "think-max"])
def test_thinking_without_tools_is_a_sample_for_each_turn(mode: Any) -> None:
    first, second = samples_of(two_turns(mode), TOKENIZER)
    assert learnt(first) == ["I think.</think>Two.<｜end▁of▁sentence｜>"]
    assert learnt(second) == ["I think.</think>Four.<｜end▁of▁sentence｜>"]
    assert text(second.ids.tolist()).count("I think.") == 1  # the first turn's is gone
    assert ("Absolute maximum" in text(first.ids.tolist())) is (mode == "think-max")


def test_thinking_with_tools_is_one_sample_with_results_as_context() -> None:
    messages = [
        user("Look?"), assistant("", "I call.", [CALL]), {"role": "tool", "tool_call_id": "c1", "content": '{"a": 7}'},
        assistant("Seen.", "It worked."), user("Thanks."), assistant("Welcome.", "Polite."),
    ]  # fmt: skip
    (sample,) = samples_of(Example(messages, "tool_use", "think-high", [TOOL]), TOKENIZER)
    call, answer, last = learnt(sample)
    assert call.startswith("I call.</think>\n\n<｜DSML｜tool_calls>")
    assert call.endswith("</｜DSML｜tool_calls><｜end▁of▁sentence｜>")
    assert answer == "It worked.</think>Seen.<｜end▁of▁sentence｜>"
    assert last == "Polite.</think>Welcome.<｜end▁of▁sentence｜>"
    assert "tool_result" in text(sample.ids.tolist())


def test_an_unfinished_conversation_teaches_what_was_said() -> None:
    (sample,) = samples_of(Example([user("One?"), assistant("Two."), user("Three?")], "conversation"), TOKENIZER)
    assert learnt(sample) == ["Two.<｜end▁of▁sentence｜>"]
    assert samples_of(Example([user("One?")], "conversation"), TOKENIZER) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_answer_is_learnt_once_behind_the_prompt_that_a_server_shows(domain: str) -> None:
    mixture = Mixture(lambda text: len(TOKENIZER.encode(text)), {domain: 1}, lengths=(128, 300))
    for example in mixture.examples(40):
        thinking, effort = MODES[example.thinking_mode]
        messages = Conversation.from_json(example.messages, example.tools or None).messages
        prompts = [
            TOKENIZER.encode_pieces(render(messages[:place], thinking=thinking, effort=effort))
            for place, message in enumerate(messages)
            if message.role == "assistant"
        ]
        starts = []
        for sample in samples_of(example, TOKENIZER):
            assert sample.learned is not None
            edges = [
                place
                for place in range(1, len(sample.ids))
                if sample.learned[place] and not sample.learned[place - 1]
            ]
            starts += [sample.ids[:edge].tolist() for edge in edges]
        assert starts == prompts


def test_two_calls_and_their_results_stay_one_sample() -> None:
    example = ToolUse().generate(seeded("two", "train", 1), kind="two_steps", mode="think-max")
    (sample,) = samples_of(example, TOKENIZER)
    assert len(learnt(sample)) == 3
