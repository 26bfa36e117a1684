"""Errors of sandboxes."""

from __future__ import annotations

import pickle

import pytest

from abyssal.sandbox import errors
from abyssal.sandbox.errors import SandboxError

SPECIAL = {
    "LimitHit": ("memory", "m"),
    "AgentLost": ("oom", "m"),
    "OutcomeUnknown": ("op", "m"),
    "Divergence": (3, "a", "b", "m"),
}


def every_error() -> list[SandboxError]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SandboxError)]
    return [kind(*SPECIAL.get(kind.__name__, ("m",))) for kind in kinds]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_they_go_from_process_to_process_whole(error: SandboxError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), "m", vars(error))
