"""Each native kernel beside what this machine can do at most, measured in the same run.

    python benchmarks/kernels.py [--only few] [--isas avx512 avx2] [--out benchmarks/results/kernels.json]

A product of a few rows reads its weight once, so it is held against the rate at which memory is read (the kernel
`read` on as many threads); weights of 400 MB take turns, so that no cache holds them. With more rows arithmetic takes
longer than reading: the limit is then the longer of the two, arithmetic at the rate of the same product of 512 rows.
Rows are float32 or `rounded` to FP8, as the real numerics round them; the latter pass as bfloat16 where that pays.
A product of many rows is held against torch's bfloat16 and float32 products of the same size. Both sides alternate,
and the fastest run of each counts, since other tenants of a machine only ever slow it down. What this does not show:
a whole layer or model.

Ways back: the experts' products are held against torch's float32 product, the rest and a whole training step of the
`nano` preset (forward and backward of 8 x 512 tokens) against the plain reference.
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
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.presets import preset
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.kernels.choice import choice, forced, native
from abyssal.kernels.experts import fused_experts
from abyssal.kernels.linear import linear, linear_by_rows
from abyssal.kernels.packed import FORMATS, Packed
from abyssal.kernels.rounding import fake_fp8
from abyssal.kernels.streams import enter, leave
from abyssal.kvcache import SequenceCache
from abyssal.model import Transformer
from abyssal.model.init import initialise

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


def experts_back(isa: str, repeat: int) -> Iterator[Row]:
    """Gradients of the experts, shared one included, against torch's product of as many rows."""
    for model, T, D, F, E, K in (("nano", 4096, 256, 128, 16, 2), ("wide", 4096, 1024, 512, 32, 2)):
        shapes = [(E, F, D), (E, F, D), (E, D, F), (F, D), (F, D), (D, F)]
        leaves = [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]
        inputs = [x.requires_grad_() for x in (torch.randn(T, D), torch.rand(T, K), *leaves)]
        stored = [(w, None) for w in inputs[2:]]
        chosen = torch.rand(T, E).topk(K).indices
        y = fused_experts(inputs[0], inputs[1], chosen, stored[:3], stored[3:], 10.0, 0)
        assert y is not None
        dy, rows = torch.randn(T, D), torch.randn(T * (K + 1), D)
        took, theirs, _ = against(
            lambda y=y, dy=dy, inputs=inputs: torch.autograd.grad(y, inputs, dy, retain_graph=True),
            lambda rows=rows, w=leaves[3].detach(): rows @ w.T,
            repeat,
        )
        flop = 2 * len(rows) * D * F  # of one product; the way back has six
        yield {
            "op": "experts_backward", "isa": isa, "model": model, "weight": "float32", "outputs": F, "inputs": D,
            "rows": T, "activations": "float32", "flop_per_s": 6 * flop / took, "torch_flop_per_s": flop / theirs,
            "of_torch": 6 * theirs / took,
        }  # fmt: skip


def training(isa: str, repeat: int) -> Iterator[Row]:
    """One mHC site and one step of `nano`, forward and backward, against the reference."""
    T, N, D = 4096, 4, 256
    site = [torch.randn(s) * 0.1 for s in ((T, N, D), (24, N * D), (24,), (3,), (D,))]
    leaves = [x.requires_grad_() for x in site]

    def one_site() -> None:
        x, gates = enter(*leaves, 1e-6, 1e-6, 20)
        leave(x, leaves[0], gates).sum().backward()

    model = initialise(Transformer(preset("nano")), seed=0)
    ids = torch.randint(0, 4096, (8, 513), generator=torch.Generator().manual_seed(0))

    def one_step() -> None:
        model.zero_grad()
        caches = [SequenceCache(memory) for memory in [model.new_memory()] for _ in ids]
        out = model.run(ids[:, :-1].flatten(), caches, [512] * len(ids))
        functional.cross_entropy(model.logits(out.z_TD), ids[:, 1:].flatten()).backward()

    def plainly(run: Callable[[], None]) -> None:
        with forced("reference"):
            run()

    for op, run in (("mhc_site", one_site), ("training_step", one_step)):
        took, theirs, ratio = against(run, lambda run=run: plainly(run), max(repeat // 3, 2))
        yield {
            "op": op, "isa": isa, "model": "nano", "weight": "float32", "outputs": D, "inputs": D, "rows": T,
            "seconds": took, "reference_seconds": theirs, "of_reference": ratio,
        }  # fmt: skip


def back(isa: str, repeat: int) -> Iterator[Row]:
    """All ways back."""
    with torch.inference_mode(False), torch.enable_grad():
        yield from [*experts_back(isa, repeat), *training(isa, repeat)]


def show(row: Row) -> None:
    what = f"{row['isa']:7s} {row['op']:16s} {row['model']:5s} {row['weight']:8s}"
    what += f" {row['outputs']:5d} x {row['inputs']:5d} x {row['rows']:4d}"
    if "of_read" in row:
        print(
            f"{what}  {row['bytes_per_s'] / 1e9:6.1f} GB/s  {row['of_read']:5.2f} of reading"
            f"  {row['of_limit']:5.2f} of the limit  {row['activations']}",
            flush=True,
        )
    elif "of_reference" in row:
        print(f"{what}  {row['seconds'] * 1e3:6.1f} ms  {row['of_reference']:5.1f}x the reference's speed", flush=True)
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
    parser.add_argument("--only", choices=["few", "many", "grouped", "back"])
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
                    "back": lambda isa=isa: back(isa, args.repeat),
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
