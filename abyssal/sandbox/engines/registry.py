"""The engines that this package has, in order of preference (sandbox.md 3)."""

from __future__ import annotations

from abyssal.sandbox.api import Engine


def installed(*, allow_unsafe: bool = False) -> list[Engine]:
    """All of them; whether one runs on this host is what its probe is for.

    Args:
        allow_unsafe: also the engine `process`, which is no sandbox and comes last.
    """
    found: list[Engine] = []
    if allow_unsafe:
        from abyssal.sandbox.engines.process import ProcessEngine

        found.append(ProcessEngine(allow_unsafe=True))
    return found
