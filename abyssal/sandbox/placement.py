"""Which engine runs a sandbox: the first in order that passes its probe and meets what is required (sandbox.md 3)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from abyssal.base.files import write_json
from abyssal.sandbox.api import STRENGTH, Box, Engine, Feature, Placed, Probe, Require, Spec, Substrate
from abyssal.sandbox.errors import Unsupported

PROBE_S = 180.0  # a machine's first start unpacks a kernel and may be emulated
AGAIN_S = 300.0  # a failure may be a busy machine's or a missing package's, and either may pass
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Placement:
    """Engines of this host in order of preference, and what their probes found.

    Args:
        engines: in order.
        kept: file in which engines that passed are kept for this boot.
    """

    def __init__(self, engines: Sequence[Engine], kept: Path):
        self.engines, self._kept = list(engines), kept
        self._probes: dict[str, Probe] = _read(kept)
        self._failed: dict[str, float] = {}  # when, by time.monotonic
        self._locks = {engine.name: asyncio.Lock() for engine in engines}

    def engine(self, name: str) -> Engine:
        """An engine by its name.

        Raises:
            Unsupported: this host has none of that name.
        """
        for engine in self.engines:
            if engine.name == name:
                return engine
        known = ", ".join(engine.name for engine in self.engines) or "none"
        raise Unsupported(f"this host has no engine {name}: it has {known}")

    def known(self, name: str) -> Engine:
        """An engine by its name, or one that can do nothing in place of one that is offered no more."""
        return next((engine for engine in self.engines if engine.name == name), Absent(name))

    async def probe(self, engine: Engine, *, again: bool = False) -> Probe:
        """What a trial start of an engine found: once per boot where it passed, after five minutes again where not."""
        async with self._locks[engine.name]:
            failed = self._failed.get(engine.name)
            if again or engine.name not in self._probes or (failed and time.monotonic() >= failed + AGAIN_S):
                try:
                    found = await asyncio.wait_for(engine.probe(), PROBE_S)
                except TimeoutError:
                    found = Probe(False, None, f"no answer within {PROBE_S:.0f} seconds")
                self._probes[engine.name] = found
                if found.ok:
                    self._failed.pop(engine.name, None)
                else:
                    self._failed[engine.name] = time.monotonic()
                probes = {name: asdict(probe) for name, probe in self._probes.items() if probe.ok}
                write_json(self._kept, {"boot": _boot(), "probes": probes})
            return self._probes[engine.name]

    async def choose(self, spec: Spec, name: str | None = None) -> Engine:
        """The engine for a sandbox.

        Args:
            spec: what is asked for.
            name: insist on this one.
        Raises:
            Unsupported: none can meet it; says why of each.
        """
        reasons = []
        for engine in self.engines if name is None else [self.engine(name)]:
            if spec.substrate not in engine.substrates:
                continue
            found = await self.probe(engine)
            if found.placed is None or not found.ok:
                reasons.append(f"{engine.name}: {found.detail}")
                continue
            missing = unmet(found.placed, spec.require)
            if not missing:
                return engine
            reasons.append(f"{engine.name}: {missing}")
        why = "; ".join(reasons) or f"this host has no engine for it{'' if name is None else f' called {name}'}"
        raise Unsupported(f"no {spec.substrate} can be run as required ({why})")


class Absent:
    """An engine that made sandboxes once and is offered no more; see `Engine`."""

    substrates: tuple[Substrate, ...] = ()
    features: frozenset[Feature] = frozenset()

    def __init__(self, name: str):
        self.name = name

    async def probe(self) -> Probe:
        return Probe(False, None, f"engine {self.name} is offered no more")

    async def create(self, box_id: str, spec: Spec, folder: Path) -> Box:
        raise Unsupported(f"engine {self.name} is offered no more")

    async def sweep(self, alive: frozenset[str]) -> Sequence[str]:
        return ()


def unmet(placed: Placed, require: Require) -> str:
    """What of the requirements an engine does not meet, or nothing."""
    if require.boundary is not None and STRENGTH[placed.boundary] < STRENGTH[require.boundary]:
        return f"its boundary is {placed.boundary}, {require.boundary} is required"
    if require.accel is not None and placed.accel != require.accel:
        return f"its acceleration is {placed.accel}, {require.accel} is required"
    soft = [words for words in placed.degraded if "limit" in words or "soft" in words]
    if require.hard and soft:
        return f"hard limits are required ({soft[0]})"
    return ""


def _boot() -> str:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return ""


def _read(kept: Path) -> dict[str, Probe]:
    try:
        found = json.loads(kept.read_bytes())
        if found["boot"] != _boot():
            return {}
        return {name: _probe(value) for name, value in found["probes"].items()}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or of another version: probe anew
        return {}


def _probe(value: dict[str, object]) -> Probe:
    placed = value.pop("placed")
    probe = Probe(placed=None, **value)  # type: ignore[arg-type]
    if not isinstance(placed, dict):
        return probe
    return Probe(probe.ok, Placed(**{**placed, "degraded": tuple(placed["degraded"])}), probe.detail, probe.remedy)
