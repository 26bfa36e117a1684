"""What is remembered of probes: an engine that passed, for the boot; one that failed, for a while."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from abyssal.sandbox import placement
from abyssal.sandbox.api import Placed, Probe, Spec
from abyssal.sandbox.errors import Unsupported
from abyssal.sandbox.placement import Absent, Placement


class Late(Absent):
    """Fails once, as on a busy machine, and passes then."""

    substrates = ("container",)

    def __init__(self) -> None:
        super().__init__("late")
        self.asked = 0

    async def probe(self) -> Probe:
        self.asked += 1
        if self.asked == 1:
            return Probe(False, None, "no guest answered")
        return Probe(True, Placed("late", "shared-kernel", "none"), "answered")


def test_a_failure_is_kept_for_a_while_and_a_pass_for_the_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(_remembered(tmp_path, monkeypatch))


async def _remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, kept = Late(), tmp_path / "probes.json"
    place = Placement([engine], kept)
    for _ in range(2):
        with pytest.raises(Unsupported, match="late: no guest answered"):
            await place.choose(Spec("container"))
    assert engine.asked == 1
    fresh = Late()
    assert not (await Placement([fresh], kept).probe(fresh)).ok
    assert fresh.asked == 1  # another edge asks for itself
    monkeypatch.setattr(placement, "AGAIN_S", 0.0)
    assert await place.choose(Spec("container")) is engine
    assert await place.choose(Spec("container")) is engine
    assert engine.asked == 2
    later = Late()
    assert (await Placement([later], kept).probe(later)).ok
    assert later.asked == 0
