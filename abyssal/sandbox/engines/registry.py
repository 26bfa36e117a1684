"""The engines that this package has, in order of preference (sandbox.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from abyssal.sandbox.api import Engine
from abyssal.sandbox.errors import Unsupported


def installed(state: Path, *, allow_unsafe: bool = False, names: Sequence[str] = ()) -> list[Engine]:
    """All of them; whether one runs on this host is what its probe is for.

    Args:
        state: folder of images, kernels and programs that engines build.
        allow_unsafe: also the engine `process`, which is no sandbox and comes last.
        names: of those to offer; empty for all.
    Raises:
        Unsupported: a name is no engine's.
    """
    from abyssal.sandbox.engines.bwrap import BwrapEngine
    from abyssal.sandbox.engines.gvisor import GvisorEngine
    from abyssal.sandbox.engines.pool import PoolEngine
    from abyssal.sandbox.engines.process import ProcessEngine
    from abyssal.sandbox.engines.qemu_microvm import QemuMicrovmEngine
    from abyssal.sandbox.engines.qemu_vm import QemuVmEngine
    from abyssal.sandbox.engines.runc import RuncEngine
    from abyssal.sandbox.engines.wasm import WasmEngine

    runc = RuncEngine(state)
    # gVisor comes last: its stronger boundary costs time, and is for those who ask for it
    found: list[Engine] = [
        PoolEngine(state, runc), WasmEngine(state), runc, BwrapEngine(state), GvisorEngine(state),
        QemuMicrovmEngine(state), QemuVmEngine(state),
    ]  # fmt: skip
    if allow_unsafe:
        found.append(ProcessEngine(allow_unsafe=True))
    unknown = set(names) - {engine.name for engine in found}
    if unknown:
        known = ", ".join(engine.name for engine in found)
        raise Unsupported(f"no engine is called {', '.join(sorted(unknown))}: choose from {known}")
    return [engine for engine in found if not names or engine.name in names]
