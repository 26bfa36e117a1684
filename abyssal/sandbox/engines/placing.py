"""Whether an engine gives what is asked for; nothing is ever weakened (sandbox.md 3, rule 2)."""

from __future__ import annotations

from collections.abc import Sequence

from abyssal.sandbox.api import STRENGTH, Placed, Spec, Substrate
from abyssal.sandbox.errors import Unsupported


def check(name: str, substrates: Sequence[Substrate], placed: Placed, spec: Spec) -> None:
    """Compare.

    Raises:
        Unsupported: with what is missing.
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
    if spec.network.mode != "none":
        raise Unsupported(f"engine {name} has no network policies yet: use Network('none')")
