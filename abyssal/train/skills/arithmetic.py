"""The same sums in the three thinking modes: how many are right, and how long is thought."""

from __future__ import annotations

import re
import statistics
from functools import partial
from typing import Any

from abyssal.train.data.arithmetic import KINDS, Arithmetic
from abyssal.train.data.example import MODES, ThinkingMode
from abyssal.train.data.pools import seeded
from abyssal.train.skills.asking import Bench, Reply, ask
from abyssal.train.skills.cases import Case
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.rates import Row, counts, rates

MOST: dict[ThinkingMode, int] = {"non-think": 32, "think-high": 256, "think-max": 1536}  # tokens of an answer
ANSWER = re.compile(r"The answer is: (-?\d+)")


def score_arithmetic(bench: Bench, plan: Plan, seed: int = 0) -> dict[str, Any]:
    """Rates by mode, kind and number of operations, and tokens of thinking by mode.

    Args:
        bench: model and journal.
        plan: how many problems.
        seed: another one gives other problems.
    """
    rows: list[Row] = []
    for mode in MODES:
        rows += bench.rows(f"arithmetic, {mode}", problems(plan.arithmetic, mode, seed), partial(_judged, bench))
    return {
        "by_mode": rates(rows, "mode"),
        "by_kind": rates(rows, "mode", "kind"),
        "by_operations": rates(rows, "mode", "operations"),
        "thinking_tokens": {mode: _lengths([row for row in rows if row["mode"] == mode]) for mode in MODES},
        "outcomes": counts(rows, "mode"),
    }


def problems(count: int, mode: ThinkingMode, seed: int = 0) -> list[Case]:
    """So many problems, sums and stories in turn; the same ones in every mode."""
    maker = Arithmetic("held_out")
    found = []
    for number in range(count):
        rng = seeded("arithmetic", "held_out", number, seed)
        example = maker.generate(rng, kind=KINDS[number % len(KINDS)], mode=mode)
        found.append(Case(f"arithmetic/{mode}/{number}", example))
    return found


def outcome_of(target: str, reply: Reply) -> str:
    """ "right", "wrong" (another number), or "unfinished" (no number in the form that was learnt)."""
    lines = reply.text.strip().splitlines()
    found = ANSWER.fullmatch(lines[-1].strip()) if lines else None
    if found is None:
        return "unfinished"
    return "right" if found.group(1) == target else "wrong"


async def _judged(bench: Bench, case: Case) -> Row:
    example, mode = case.example, case.example.thinking_mode
    reply = await ask(bench.completer, example.messages[:1], mode, MOST[mode])
    outcome = outcome_of(example.meta["targets"][-1], reply)
    return {
        "kind": example.source,
        "mode": mode,
        "operations": example.meta["operations"],
        "passed": outcome == "right",
        "outcome": outcome,
        "thinking": reply.reasoning_tokens,
        "question": example.messages[0]["content"],
        "target": example.meta["targets"][-1],
        "reply": reply.to_json(),
    }


def _lengths(rows: list[Row]) -> dict[str, float]:
    tokens = [row["thinking"] for row in rows]
    if not tokens:
        return {}
    return {"mean": statistics.fmean(tokens), "median": statistics.median(tokens), "most": max(tokens)}
