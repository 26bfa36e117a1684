"""All checks, and one put to an engine."""

from __future__ import annotations

from pathlib import Path

from abyssal.sandbox.api import Engine, Spec
from abyssal.sandbox.conformance import escaping, limiting, living, moving, reaching, running
from abyssal.sandbox.conformance.bench import SMALL, Bench, Check

CHECKS: tuple[Check, ...] = tuple(
    check for module in (running, moving, limiting, living, escaping, reaching) for check in module.check.all
)


def missing(check: Check, engine: Engine) -> str:
    """Why a check does not apply to an engine; empty where it does."""
    lacks = sorted(check.needs - engine.features)
    return f"engine {engine.name} has no {', '.join(lacks)}" if lacks else ""


async def put(check: Check, engine: Engine, folder: Path) -> None:
    """Put a check to an engine.

    Raises:
        Failed: the engine does not hold.
    """
    await check.action(Bench(engine, folder, Spec(engine.substrates[0], limits=SMALL)))
