"""Calls of tools that were never seen, turn by turn: a model's own right call is followed by the tool's result."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from abyssal.train.data.example import Example, Message, ThinkingMode, assistant
from abyssal.train.data.pools import seeded
from abyssal.train.data.tool_use import KINDS, ToolUse
from abyssal.train.data.values import as_text
from abyssal.train.skills.asking import Bench, Reply, ask
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.rates import Row, counts, rates

MOST: dict[ThinkingMode, int] = {"non-think": 384, "think-high": 512, "think-max": 1536}  # tokens of a turn
UNCLOSED = "truncated_reasoning"  # of the parser's repairs, the one that says nothing about calls
CUT = frozenset({UNCLOSED, "incomplete_call", "leaked_token"})  # those that an answer needs that ends inside a call
Call = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A conversation with tools up to the answer to its first request.

    Attributes:
        id: its name.
        example: from the generator.
        mode: how much to think.
        bound: whether calls are held to their grammar.
    """

    id: str
    example: Example
    mode: ThinkingMode
    bound: bool = True

    @property
    def messages(self) -> list[Message]:
        """The messages of the first request; a second one is another task."""
        users = [place for place, m in enumerate(self.example.messages) if m["role"] == "user"]
        return self.example.messages[: users[1] if len(users) > 1 else None]


@dataclass
class Course:
    """How a conversation went.

    Attributes:
        outcome: "right", or what was wrong with the first turn that was: see `verdict`.
        turn: number of that turn, or of turns that were right.
        malformed: whether the parser had to mend a turn.
        tells: whether the last answer says all that the last result says; None if it came to none.
        replies: what was said.
    """

    outcome: str = "right"
    turn: int = 0
    malformed: bool = False
    tells: bool | None = None
    replies: list[Reply] = field(default_factory=list)


def score_tools(bench: Bench, plan: Plan, seed: int = 0) -> dict[str, Any]:
    """Rates by mode and kind, with the grammar and without.

    An item passes if every turn up to the answer made exactly the calls that it should, and none where it should not.

    Args:
        bench: model and journal.
        plan: how many items, in which modes.
        seed: another one gives other items.
    """
    results = {}
    for bound in (True, False):
        rows: list[Row] = []
        for mode in plan.tool_modes:
            label = f"tools, {mode}, {'with' if bound else 'without'} grammar"
            rows += bench.rows(
                label, tasks(plan.tools if bound else plan.free, mode, bound, seed), partial(_judged, bench)
            )
        results["with_grammar" if bound else "without_grammar"] = {
            "by_kind": rates(rows, "mode", "kind"),
            "well_formed": rates(rows, "mode", what="well_formed"),
            "tells_result": rates([row for row in rows if row["tells"] is not None], "mode", "kind", what="tells"),
            "outcomes": counts(rows, "mode", "kind"),
        }
    return results


def tasks(count: int, mode: ThinkingMode, bound: bool, seed: int = 0) -> list[Task]:
    """So many tasks of each kind; the same problems in every mode."""
    maker = ToolUse("held_out")
    return [
        Task(
            f"tools/{'bound' if bound else 'free'}/{mode}/{kind}/{number}",
            maker.generate(seeded(f"tools {kind}", "held_out", number, seed), kind=kind, mode=mode),
            mode,
            bound,
        )
        for kind in KINDS
        for number in range(count)
    ]


async def _judged(bench: Bench, task: Task) -> Row:
    course = await follow(bench, task)
    return {
        "kind": task.example.source,
        "mode": task.mode,
        "grammar": task.bound,
        "passed": course.outcome == "right",
        "outcome": course.outcome,
        "turn": course.turn,
        "well_formed": not course.malformed,
        "tells": course.tells,
        "calls": task.example.meta["calls"],
        "replies": [reply.to_json() for reply in course.replies],
    }


async def follow(bench: Bench, task: Task) -> Course:
    """Go through a conversation as long as the model does what it should."""
    course = Course()
    said: list[Message] = []
    turns = iter(task.example.meta["calls"])
    for message in task.messages:
        if message["role"] != "assistant":
            said.append(message)
            continue
        reply = await ask(bench.completer, said, task.mode, MOST[task.mode], task.example.tools, bound=task.bound)
        course.replies.append(reply)
        course.malformed |= malformed(reply)
        expected = next(turns)
        course.outcome = verdict(expected, reply)
        if course.outcome != "right":
            break
        course.turn += 1
        if not expected and said[-1]["role"] == "tool":
            course.tells = tells(json.loads(said[-1]["content"]), reply.content)
        said.append(_as_message(reply, message, expected))
    return course


def verdict(expected: list[Call], reply: Reply) -> str:
    """What a turn did.

    "right"; "malformed"; "unfinished": it ended for another reason than its own end; "none": no call where there
    should be one; "uncalled for": a call where there should be none; "wrong number" of calls, "wrong tool" or
    "wrong arguments".
    """
    if malformed(reply):
        return "malformed"
    if reply.finish == "length" or reply.repairs:
        return "unfinished"
    if not expected:
        return "uncalled for" if reply.calls else "right"
    if not reply.calls:
        return "none"
    if len(reply.calls) != len(expected):
        return "wrong number"
    if sorted(name for name, _ in reply.calls) != sorted(call["name"] for call in expected):
        return "wrong tool"
    return "right" if _matched(expected, reply) is not None else "wrong arguments"


def malformed(reply: Reply) -> bool:
    """Whether something had to be mended, other than what an answer lacks that was cut off at its limit."""
    return not (CUT if reply.finish == "length" else {UNCLOSED}).issuperset(reply.repairs)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 5 is 5.0, but 1 is not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def tells(result: dict[str, Any], content: str) -> bool:
    """Whether an answer holds every value of a result; "it worked" has no value."""
    return all(as_text(value) in content for name, value in result.items() if name != "ok")


def _matched(expected: list[Call], reply: Reply) -> list[int] | None:
    """For each call that was made, which expected one it is; calls made at once have no order."""
    left = list(range(len(expected)))
    found = []
    for name, arguments in reply.calls:
        given = json.loads(arguments)
        at = next((i for i in left if expected[i]["name"] == name and same(expected[i]["arguments"], given)), None)
        if at is None:
            return None
        left.remove(at)
        found.append(at)
    return found


def _as_message(reply: Reply, model: Message, expected: list[Call]) -> Message:
    """A right turn as a message; its calls take the ids of the generator's, to which the results refer."""
    wire = [
        {"id": model["tool_calls"][at]["id"], "type": "function", "function": {"name": name, "arguments": arguments}}
        for (name, arguments), at in zip(reply.calls, _matched(expected, reply) or [], strict=True)
    ]
    return assistant(reply.content, reply.reasoning, wire)
