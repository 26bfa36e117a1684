"""What this machine has: cores, memory, disk. No torch."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Facts of a machine; bytes where nothing else is said."""

    cpu: str
    architecture: str
    cores: int
    memory_total: int
    memory_available: int
    disk_free: int


def this_machine(folder: Path | str = ".") -> Machine:
    """Read the facts; the disk is the one that holds `folder`."""
    memory = _meminfo()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = memory.get("MemTotal", physical)
    return Machine(
        cpu=_cpu_name(),
        architecture=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_total=total,
        memory_available=memory.get("MemAvailable", total),
        disk_free=shutil.disk_usage(folder).free,
    )


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16: AVX-512 BF16, AMX, or Arm's BF16.

    False where the system does not tell: without the instructions such products are tens of times slower.
    """
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpu_flags())


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def _cpu_flags() -> set[str]:
    """Extensions of the instruction set, as Linux names them: `flags` on x86, `Features` on Arm."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:  # not Linux
        pass
    return set()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
