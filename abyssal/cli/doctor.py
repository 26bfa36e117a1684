"""`abyssal doctor`: what this machine is, and which kernels run on it and why."""

from __future__ import annotations

import json
import platform
import time
from typing import Annotated, Any

import typer

from abyssal.base.machine import this_machine

QUICK_BYTES = 1 << 29  # larger than any cache


def doctor(
    json_out: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    bandwidth: Annotated[bool, typer.Option(help="Measure how fast memory is read (a second).")] = True,
) -> None:
    """Show the machine, its instruction sets, and what computes."""
    report = _report(bandwidth)
    if json_out:
        print(json.dumps(report))
        return
    machine, kernels, torch = report["machine"], report["kernels"], report["torch"]
    print(f"{machine['cpu']} ({machine['architecture']}), {machine['cores']} cores")
    print(f"  memory   {machine['memory_available'] / 2**30:.1f} of {machine['memory_total'] / 2**30:.1f} GiB free")
    if report["read_bytes_per_s"] is not None:
        print(f"  reading  {report['read_bytes_per_s'] / 1e9:.1f} GB/s")
    print(f"  python   {report['python']}, torch {torch['version']} on {torch['threads']} threads")
    print(f"kernels: {kernels['name']}, because {kernels['why']}")
    for name in kernels["built"]:
        print(f"  {name:8s} {'yes' if name in kernels['supported'] else 'not on this processor'}")
    if kernels["threads"] is not None:
        print(f"  threads  {kernels['threads']}")


def _report(bandwidth: bool) -> dict[str, Any]:
    import torch

    from abyssal.kernels.choice import choice, native

    machine, chosen, fast = this_machine(), choice(), native()
    return {
        "machine": {
            "cpu": machine.cpu,
            "architecture": machine.architecture,
            "cores": machine.cores,
            "memory_total": machine.memory_total,
            "memory_available": machine.memory_available,
        },
        "python": platform.python_version(),
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads()},
        "kernels": {
            "name": chosen.name,
            "why": chosen.why,
            "built": list(chosen.built),
            "supported": list(chosen.supported),
            "threads": fast.threads() if fast is not None else None,
        },
        "read_bytes_per_s": _read_rate() if bandwidth else None,
    }


def _read_rate() -> float:
    """Bytes a second of the best of a few passes over memory that no cache holds."""
    import torch

    from abyssal.kernels.choice import native

    fast = native()
    data = torch.ones(QUICK_BYTES, dtype=torch.uint8)
    words = data.view(torch.int64)
    best = 0.0
    for _ in range(4):
        begin = time.perf_counter()
        if fast is not None:
            fast.read(data)
        else:
            words.sum()
        best = max(best, QUICK_BYTES / (time.perf_counter() - begin))
    return best
