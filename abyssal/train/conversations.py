"""Conversations as sequences to learn from: rendered by the encoder that serves (training.md 5.1).

Only what the assistant says is to be predicted: thinking, calls, answer, and the mark that ends them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from abyssal.encoding.messages import Conversation, Message
from abyssal.encoding.render import render
from abyssal.encoding.snapshots import Effort, Snapshot
from abyssal.encoding.tokenizer import Tokenizer
from abyssal.train.data.example import Example, ThinkingMode
from abyssal.train.packing import Sample

MODES: dict[ThinkingMode, tuple[bool, Effort | None]] = {
    "non-think": (False, None),
    "think-high": (True, "high"),
    "think-max": (True, "max"),
}


def prompt_ids(
    messages: Sequence[Message], mode: ThinkingMode, tokenizer: Tokenizer, snapshot: Snapshot = "april"
) -> list[int]:
    """Ids of the prompt that these messages make in a thinking mode.

    Raises:
        InputError: a message is malformed.
    """
    thinking, effort = MODES[mode]
    return tokenizer.encode_pieces(render(messages, thinking=thinking, effort=effort, snapshot=snapshot))


def samples_of(example: Example, tokenizer: Tokenizer, snapshot: Snapshot = "april") -> list[Sample]:
    """The sequences of a conversation, with the assistant's tokens to be learnt.

    One sequence holds all answers as long as each was given behind the very tokens that stand before it now. Where
    the encoder rewrites history (it drops thinking at a new question, without tools), a sequence ends and the next
    begins, so that every answer is learnt behind the prompt that a server would have shown.

    Raises:
        InputError: a message is malformed.
    """
    messages = Conversation.from_json(example.messages, example.tools or None).messages
    found: list[tuple[list[int], list[tuple[int, int]]]] = []  # ids, and which parts of them are answers
    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = prompt_ids(messages[:place], example.thinking_mode, tokenizer, snapshot)
        whole = prompt_ids(messages[: place + 1], example.thinking_mode, tokenizer, snapshot)
        span = (len(before), len(whole))
        if found and before[: len(found[-1][0])] == found[-1][0]:
            found[-1] = (whole, [*found[-1][1], span])
        else:
            found.append((whole, [span]))
    samples = []
    for ids, spans in found:
        learned = np.zeros(len(ids), np.bool_)
        for start, end in spans:
            learned[start:end] = True
        samples.append(Sample(np.array(ids, np.int64), learned))
    return samples
