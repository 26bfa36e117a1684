"""Text repeated, reversed, spelt or sorted without a mistake."""

from __future__ import annotations

from functools import partial
from typing import Any

from abyssal.train.data.copying import KINDS, Copying
from abyssal.train.skills.asking import Bench, ask
from abyssal.train.skills.cases import Case, cases
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.rates import Row, rates

MOST = 384  # tokens of an answer


def score_copying(bench: Bench, plan: Plan, seed: int = 0) -> dict[str, Any]:
    """Rates by kind, in non-think.

    Args:
        bench: model and journal.
        plan: how many items of each kind.
        seed: another one gives other items.
    """
    rows = bench.rows("copying", requests(plan.copying, seed), partial(_judged, bench))
    return {"by_kind": rates(rows, "kind")}


def requests(count: int, seed: int = 0) -> list[Case]:
    """So many requests of each kind."""
    return cases("copying", Copying("held_out"), KINDS, count, seed)


async def _judged(bench: Bench, case: Case) -> Row:
    example = case.example
    reply = await ask(bench.completer, example.messages[:1], "non-think", MOST)
    (target,) = example.meta["targets"]
    return {
        "kind": example.source,
        "passed": reply.text == target,
        "target": target,
        "reply": reply.to_json(),
    }
