"""Text repeated, reversed, spelt or sorted without a mistake."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from abyssal.train.data.copying import KINDS, Copying
from abyssal.train.data.example import Example
from abyssal.train.data.pools import seeded
from abyssal.train.skills.asking import Bench, ask
from abyssal.train.skills.plan import Plan
from abyssal.train.skills.rates import Row, rates

MOST = 384  # tokens of an answer


@dataclass(frozen=True)
class Request:
    """A text to copy."""

    id: str
    example: Example


def score_copying(bench: Bench, plan: Plan, seed: int = 0) -> dict[str, Any]:
    """Rates by kind, in non-think.

    Args:
        bench: model and journal.
        plan: how many items of each kind.
        seed: another one gives other items.
    """
    rows = bench.rows("copying", requests(plan.copying, seed), partial(_judged, bench))
    return {"by_kind": rates(rows, "kind")}


def requests(count: int, seed: int = 0) -> list[Request]:
    """So many requests of each kind."""
    maker = Copying("held_out")
    return [
        Request(
            f"copying/{kind}/{number}",
            maker.generate(seeded(f"copying {kind}", "held_out", number, seed), kind=kind, mode="non-think"),
        )
        for kind in KINDS
        for number in range(count)
    ]


async def _judged(bench: Bench, request: Request) -> Row:
    example = request.example
    reply = await ask(bench.completer, example.messages[:1], "non-think", MOST)
    (target,) = example.meta["targets"]
    return {
        "kind": example.source,
        "passed": reply.text == target,
        "target": target,
        "reply": reply.to_json(),
    }
