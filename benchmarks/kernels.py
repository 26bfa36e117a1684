"""Each native kernel beside what this machine can do at most, measured in the same run.

    python benchmarks/kernels.py [--only linear] [--isas avx512 avx2] [--out benchmarks/results/kernels.json]

A product of a few rows reads its weight once, so it is held against the rate at which memory is read (the kernel
`read` on as many threads); weights of 400 MB take turns, so that no cache holds them. With more rows arithmetic takes
longer than reading: the limit is then the longer of the two, arithmetic at the rate of the same product of 512 rows.
Rows are float32 or `rounded` to FP8, as the real numerics round them; the latter pass as bfloat16 where that pays.
A product of many rows is held against torch's bfloat16 and float32 products of the same size. Both sides alternate,
and the fastest run of each counts, since other tenants of a machine only ever slow it down. What this does not show:
a whole layer or model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.kernels.choice import choice, forced, native
from abyssal.kernels.linear import linear, linear_by_rows
from abyssal.kernels.packed import FORMATS, Packed
from abyssal.kernels.rounding import fake_fp8

WORKING_SET = 400_000_000
READ_BYTES = 1 << 29
SHAPES = {"flash": ((2048, 4096), (4096, 2048)), "pro": ((3072, 7168), (7168, 3072))}
ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = 512
Row = dict[str, Any]


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def against(run: Callable[[], object], limit: Callable[[], object], repeat: int) -> tuple[float, float, float]:
    """Fastest seconds of both, taken in turns, and limit / run."""
    run(), limit()
    pairs = [(seconds(run), seconds(limit)) for _ in range(repeat)]
    ours, theirs = min(a for a, _ in pairs), min(b for _, b in pairs)
    return ours, theirs, theirs / ours


def fast() -> ModuleType:
    module = native()
    assert module is not None
    return module


def random_weight(kind: str, *shape: int) -> tuple[Tensor, Tensor | None]:
    """Random codes with scales near one; values do not matter for speed, but subnormal numbers would."""
    *lead, outputs, inputs = shape
    if kind == "float4":
        codes = torch.randint(0, 256, (*lead, outputs, inputs // 2), dtype=torch.uint8)
        return codes, torch.randint(120, 130, (*lead, outputs, inputs // 32), dtype=torch.uint8)
    if kind == "float8":
        codes = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return codes, torch.randint(120, 130, (*lead, -(-outputs // 128), -(-inputs // 128)), dtype=torch.uint8)
    return torch.randn(shape).to(torch.bfloat16 if kind == "bfloat16" else torch.float32), None


def few_rows(isa: str, repeat: int, kinds: list[str]) -> Iterator[Row]:
    """Matrix-vector and small products, against reading."""
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    for model, shapes in SHAPES.items():
        for outputs, inputs in shapes:
            for kind in kinds:
                one = Packed(*random_weight(kind, outputs, inputs))
                weights = [one, *(Packed(*one.stored()) for _ in range(max(WORKING_SET // one.nbytes, 2) - 1))]
                size = sum(weight.nbytes for weight in weights)
                for rows, rounded in itertools.product(ROWS, (False, True)):
                    if rounded and kind in ("float32", "bfloat16"):
                        continue
                    x, large = torch.randn(rows, inputs), torch.randn(PREFILL_ROWS, inputs)
                    if rounded:
                        x, large = fake_fp8(x, 128), fake_fp8(large, 128)

                    def run(weights: list[Packed] = weights, x: Tensor = x) -> None:
                        for weight in weights:
                            linear(x, weight)

                    took, read, ratio = against(run, lambda: fast().read(memory), repeat)
                    per_row = min(seconds(lambda x=large, w=one: linear(x, w)) for _ in range(3)) / PREFILL_ROWS
                    share = ratio * size / READ_BYTES
                    limit = max(read * size / READ_BYTES, per_row * rows * len(weights))
                    yield {
                        "op": "linear", "isa": isa, "model": model, "weight": kind, "outputs": outputs,
                        "inputs": inputs, "rows": rows, "activations": "rounded" if rounded else "float32",
                        "bytes_per_s": size / took, "read_bytes_per_s": READ_BYTES / read, "of_read": share,
                        "of_limit": limit / took, "flop_per_s": 2 * rows * outputs * inputs * len(weights) / took,
                    }  # fmt: skip


def many_rows(isa: str, repeat: int, kinds: list[str]) -> Iterator[Row]:
    """Prefill products, unpacking included, against torch's."""
    for model, shapes in SHAPES.items():
        for outputs, inputs in shapes:
            values = torch.randn(outputs, inputs)
            flop = 2 * PREFILL_ROWS * outputs * inputs
            for dtype, rounded in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
                x, dense = torch.randn(PREFILL_ROWS, inputs).to(dtype), values.to(dtype)
                x = fake_fp8(x, 128) if rounded else x
                name = "rounded" if rounded else str(dtype).removeprefix("torch.")
                for kind in kinds:
                    weight = Packed(*random_weight(kind, outputs, inputs))
                    took, theirs, ratio = against(
                        lambda x=x, weight=weight: linear(x, weight), lambda x=x, dense=dense: x @ dense.T, repeat
                    )
                    yield {
                        "op": "linear", "isa": isa, "model": model, "weight": kind, "outputs": outputs,
                        "inputs": inputs, "rows": PREFILL_ROWS, "activations": name,
                        "flop_per_s": flop / took, "torch_flop_per_s": flop / theirs, "of_torch": ratio,
                    }  # fmt: skip


def grouped(isa: str, repeat: int) -> Iterator[Row]:
    """Rows of many experts in one call: 256 tokens with 6 of 32 experts each."""
    outputs, inputs = SHAPES["flash"][0]
    weight = Packed(*random_weight("float4", 32, outputs, inputs))
    counts = torch.bincount(torch.randint(0, 32, (256 * 6,)), minlength=32)
    x = torch.randn(int(counts.sum()), inputs).bfloat16()
    dense = torch.randn(outputs, inputs).bfloat16()
    took, theirs, ratio = against(lambda: linear_by_rows(x, weight, counts), lambda: x @ dense.T, repeat)
    flop = 2 * len(x) * outputs * inputs
    yield {
        "op": "linear_by_rows", "isa": isa, "model": "flash", "weight": "float4", "outputs": outputs,
        "inputs": inputs, "rows": len(x), "activations": "bfloat16", "flop_per_s": flop / took,
        "torch_flop_per_s": flop / theirs, "of_torch": ratio,
    }  # fmt: skip


def show(row: Row) -> None:
    what = f"{row['isa']:7s} {row['op']:15s} {row['model']:5s} {row['weight']:8s}"
    what += f" {row['outputs']:5d} x {row['inputs']:5d} x {row['rows']:4d}"
    if "of_read" in row:
        print(
            f"{what}  {row['bytes_per_s'] / 1e9:6.1f} GB/s  {row['of_read']:5.2f} of reading"
            f"  {row['of_limit']:5.2f} of the limit  {row['activations']}",
            flush=True,
        )
    else:
        print(
            f"{what}  {row['flop_per_s'] / 1e9:6.0f} GFLOP/s  {row['of_torch']:5.2f} of torch's {row['activations']}",
            flush=True,
        )


def main() -> None:
    """Measure, print, store JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fit = [name for name in choice().supported if name != "scalar"]
    parser.add_argument("--isas", nargs="+", default=fit)
    parser.add_argument("--weights", nargs="+", default=list(FORMATS))
    parser.add_argument("--only", choices=["few", "many", "grouped"])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    args = parser.parse_args()
    rows: list[Row] = []
    with torch.inference_mode():
        for isa in args.isas:
            with forced(isa):
                parts = {
                    "few": lambda isa=isa: few_rows(isa, args.repeat, args.weights),
                    "many": lambda isa=isa: many_rows(isa, args.repeat, args.weights),
                    "grouped": lambda isa=isa: grouped(isa, args.repeat),
                }
                for name, part in parts.items():
                    if args.only in (None, name):
                        for row in part():
                            show(row)
                            rows.append(row)
    machine = this_machine()
    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": fast().threads(),
        "rows": rows,
    }
    write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
