"""What engines have in common when a box is asked for: nothing is weakened, and nothing is left half made."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

from abyssal.sandbox.api import STRENGTH, Box, Feature, Placed, Spec, Substrate
from abyssal.sandbox.errors import Unsupported
from abyssal.sandbox.network.policy import check_policy


def check(name: str, substrates: Sequence[Substrate], features: frozenset[Feature], placed: Placed, spec: Spec) -> None:
    """Compare what is asked for with what there is (sandbox.md 3, rule 2).

    Raises:
        Unsupported: with what is missing.
        BadRequest: the network policy is none.
    """
    want = spec.require
    if spec.substrate not in substrates:
        raise Unsupported(f"engine {name} runs {', '.join(substrates)}, not {spec.substrate}")
    if want.boundary is not None and STRENGTH[placed.boundary] < STRENGTH[want.boundary]:
        raise Unsupported(f"engine {name} has boundary {placed.boundary}, weaker than {want.boundary}")
    if want.accel is not None and want.accel != placed.accel:
        raise Unsupported(f"engine {name} has acceleration {placed.accel}, not {want.accel}")
    if want.hard and placed.degraded:
        raise Unsupported(f"engine {name} cannot enforce everything on this host: {', '.join(placed.degraded)}")
    if spec.network.mode != "none" and "network" not in features:
        raise Unsupported(f"engine {name} has no network: use Network('none'), or substrate container, microvm or vm")
    check_policy(spec.network)


async def whole(work: Coroutine[Any, Any, Box]) -> Box:
    """A box's making, to its end: whoever gives up waiting for it leaves nothing behind."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(Exception):
            await (await task).stop()
        raise
