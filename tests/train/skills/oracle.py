"""Completers that know every answer, or none; what they say goes through the real parser."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

from abyssal.chat.api import Accepted, Completion, Continued, Load, PromptUse, TokenInfo
from abyssal.encoding.literals import EOS
from abyssal.encoding.messages import Conversation
from abyssal.encoding.render import prompt_text, render
from abyssal.encoding.snapshots import Snapshot
from abyssal.encoding.tokenizer import Piece
from abyssal.train.conversations import MODES
from abyssal.train.data.example import Example, Message, ThinkingMode, assistant, user
from abyssal.train.skills.arithmetic import problems
from abyssal.train.skills.asking import Bench
from abyssal.train.skills.chat import talks
from abyssal.train.skills.copying import requests
from abyssal.train.skills.journal import Journal
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.retrieval import parts_of, questions_of
from abyssal.train.skills.tools import tasks


class Oracle:
    """Says what it was told to say to a prompt, in one piece; every byte of a text costs it one bit.

    Args:
        answers: completion by prompt, without the mark of the end.
        otherwise: what it says to all other prompts.
    """

    model = "oracle"
    snapshot: Snapshot = "april"
    context = 1 << 20

    def __init__(self, answers: Mapping[str, str] | None = None, otherwise: str | None = None):
        self.answers, self.otherwise = dict(answers or {}), otherwise
        self.prompts: list[str] = []
        self.bound: list[bool] = []

    def encode(self, prompt: Sequence[Piece]) -> list[int]:
        """Bytes; a special token is 256."""
        return [number for piece in prompt for number in ([256] if piece.special else piece.text.encode())]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def special(self, text: str) -> int | None:
        return None

    def count(self, prompt: Sequence[Piece]) -> int:
        """Words and blanks: about what a tokenizer makes of them."""
        return len(prompt_text(prompt).split())

    def load(self) -> Load:
        return Load()

    def interrupt(self) -> None:
        raise NotImplementedError

    async def complete(self, completion: Completion) -> AsyncIterator[Accepted | PromptUse | Continued]:
        """Say it."""
        pieces = [piece for piece in completion.prompt if isinstance(piece, Piece)]
        yield Accepted()
        ids = self.encode(pieces)
        scores = [TokenInfo(token, -math.log(2)) for token in ids] if completion.score_prompt else []
        yield PromptUse(len(ids), 0, scores=(None, *scores[1:]) if scores else ())
        prompt = prompt_text(pieces)
        self.prompts.append(prompt)
        self.bound.append(completion.constraint is not None)
        said = self.answers.get(prompt, self.otherwise)
        assert said is not None, f"nobody told what to say to {prompt[-200:]!r}"
        yield Continued(0, said + EOS, None, "stop", count=len(said.split()))


def told(messages: Sequence[Message], mode: ThinkingMode, tools: Sequence[dict[str, object]] = ()) -> dict[str, str]:
    """What the assistant says to each prompt of a conversation."""
    read = Conversation.from_json(list(messages), list(tools) or None).messages
    thinking, effort = MODES[mode]
    found = {}
    for place, message in enumerate(read):
        if message.role == "assistant":
            before, whole = (
                prompt_text(render(read[:end], thinking=thinking, effort=effort)) for end in (place, place + 1)
            )
            assert whole.startswith(before)
            found[before] = whole.removeprefix(before).removesuffix(EOS)
    return found


def examples(plan: Plan) -> Iterator[tuple[Example, ThinkingMode]]:
    """Everything that a plan asks, but for retrieval."""
    for mode in plan.tool_modes:
        for task in tasks(plan.tools, mode, True):
            yield Example(task.messages, "tool_use", mode, task.example.tools), mode
    for thinking in MODES:
        yield from ((problem.example, thinking) for problem in problems(plan.arithmetic, thinking))
    yield from ((item.example, "non-think") for item in (*talks(plan.chat), *requests(plan.copying)))


def knowing(plan: Plan, filler: Sequence[str] = ()) -> Oracle:
    """A completer that is right about everything that a plan asks."""
    oracle = Oracle()
    for example, mode in examples(plan):
        oracle.answers |= told(example.messages, mode, example.tools)
    for mode in plan.retrieval_modes:
        for stretch in plan.retrieval:
            for part in parts_of(stretch, plan.depths, mode):
                for item in questions_of(stretch, part, mode, oracle, filler):
                    thought = "" if mode == "non-think" else "I look for it."
                    oracle.answers |= told([user(item.prompt), assistant(item.target, thought)], mode)
    return oracle


def bench_of(oracle: Oracle, rows: Iterable[dict[str, object]] = ()) -> Bench:
    """A bench around it; with rows in its journal, if there are any."""
    journal = Journal(None, {})
    for row in rows:
        journal.add(row)
    return Bench(oracle, journal, silent=True)
