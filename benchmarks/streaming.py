"""Run a Flash-shaped release within a memory limit, from disk.

    python benchmarks/streaming.py [--experts 256] [--limit 2GiB] [--release FOLDER] [--out FILE]

Writes a random release with Flash's real widths and two blocks (a hash-routed CSA and an HCA), and measures, each in
a process of its own with its peak memory:

- decoding through the engine with the experts on disk, for one and for several answers at once;
- the same with the release in memory, where it fits: the tokens must be equal;
- `abyssal logits`, layer by layer.

The limit is the disk: the same files, read past the page cache (O_DIRECT) by several threads in pieces of several
sizes, the best of them, before and after each measurement. `share` is the bytes of the experts that were not in memory,
divided by time and that rate. Synthetic weights are routed nearly uniformly, so the hit rate is about the cached
share; trained models repeat experts more. What this does not show: all 43 blocks, where the head counts for less and
the cached share is smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from abyssal.arch.presets import preset
from abyssal.base.files import write_json
from abyssal.base.machine import this_machine
from abyssal.checkpoint.direct import PAGE, DirectFiles
from abyssal.checkpoint.disk_model import load_from_disk, plan_disk
from abyssal.checkpoint.load import load_model
from abyssal.checkpoint.release import Release
from abyssal.checkpoint.shards import StoredTensor
from abyssal.cli.models import parse_bytes
from abyssal.engine.engine import Engine
from abyssal.engine.request import Request
from abyssal.engine.sampler import Sampling
from abyssal.kernels.choice import choice
from abyssal.kernels.linear import linear
from abyssal.kernels.packed import Packed
from abyssal.quant.numerics import Numerics

GIB, MIB = 2**30, 2**20
PROMPT, WARM = 16, 8  # tokens of a prompt, and of an answer before the clock runs
SAMPLE = GIB  # bytes of one measurement of the disk
WAYS = ((4, 16 * MIB), (8, 4 * MIB), (8, MIB), (16, MIB))  # threads, and bytes of a piece


def peak() -> int:
    """The kernel's own mark of this address space: a child's ru_maxrss would also count its parent before exec."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(*arguments: object) -> dict[str, Any]:
    """This script in a process of its own.

    Raises:
        MemoryError: the system ended it.
    """
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        raise MemoryError
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# the disk


def read_rate(files: list[Path], threads: int, piece: int) -> float:
    """Bytes per second of reading random pieces, aligned, past the page cache."""
    pieces = [
        StoredTensor("", "U8", (piece,), path, start, piece)
        for path in files
        for start in range(0, path.stat().st_size // PAGE * PAGE - piece, piece)
    ]
    chosen = random.Random(time.time_ns()).sample(pieces, min(SAMPLE // piece, len(pieces)))
    direct = DirectFiles()
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lambda one: len(direct.read([one])), chosen))
        return len(chosen) * piece / (time.perf_counter() - begin)


class Disk:
    """What the disk gives, measured again and again."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.rates: dict[tuple[int, int], list[float]] = {way: [] for way in WAYS}

    def measure(self) -> None:
        for way in WAYS:
            self.rates[way].append(read_rate(self.files, *way))

    @property
    def rate(self) -> float:
        """The median of the best way."""
        return max(map(statistics.median, self.rates.values()))


# in children


def decode(folder: Path, limit: int, streams: int, tokens: int) -> None:
    """Answers of `streams` requests at once; with a limit of 0 from memory."""
    release = Release(folder)
    model, use, plan = None, None, None
    if limit:
        plan = plan_disk(release, Numerics(), limit)
        model, cache = load_from_disk(release, plan.slots)
        use = cache.use
        engine = Engine(model, budget=plan.cache, slots=plan.sequences, step_tokens=plan.tokens, expert_use=use)
    else:
        engine = Engine(load_model(release, keep_stored=True), budget=GIB // 4, slots=16)
    rng = random.Random(1)
    for seed in range(streams):
        prompt = tuple(rng.randrange(release.config.vocab_size) for _ in range(PROMPT))
        engine.add(Request(prompt=prompt, max_tokens=WARM + tokens, sampling=Sampling(seed=seed)))
    answers: list[list[int]] = [[] for _ in range(streams)]
    begin, before = 0.0, (0, 0, 0, 0.0)
    while engine.busy:
        if not begin and min(map(len, answers)) >= WARM:
            done = sum(map(len, answers))
            begin = time.perf_counter()
            before = (use.hits, use.misses, use.bytes_read, use.waited_s) if use else before
        for event in engine.step():
            assert event.token is not None, event.error
            answers[event.request].append(event.token)
    seconds = time.perf_counter() - begin
    result: dict[str, Any] = {
        "streams": streams,
        "tokens_per_s": (sum(map(len, answers)) - done) / seconds,
        "seconds": seconds,
        "peak_bytes": peak(),
        "answers": answers,
    }
    if use is not None and plan is not None:
        after = use.hits, use.misses, use.bytes_read, use.waited_s
        hits, misses, read, waited = (b - a for a, b in zip(before, after, strict=True))
        cached = plan.slots / (release.config.n_routed_experts * release.config.num_hidden_layers)
        result |= {
            "hit_rate": hits / (hits + misses), "cached_share": cached, "bytes_read": read,
            "bytes_read_per_s": read / seconds, "waited_share": waited / seconds, "slots": plan.slots,
        }  # fmt: skip
    print(json.dumps(result))


def logits(folder: Path, limit: str, ids: str, out: Path) -> None:
    """`abyssal logits` on this release."""
    from abyssal.checkpoint.stream import stream_logits

    begin = time.perf_counter()
    stream_logits(folder, [int(i) for i in ids.split(",")], out, max_memory=parse_bytes(limit), silent=True)
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": peak()}))


# here


def miss_cost(folder: Path) -> dict[str, float]:
    """Milliseconds of one row through the matrices of an expert: packed, packing it, and as stored, packed on the way.

    Minima; what is read comes from other memory each time, as from a disk.
    """
    release = Release(folder)
    names = [f"layers.1.ffn.experts.{e}.w1.weight" for e in range(24)]
    stored = [release.stored(name) for name in names]
    packed = [Packed(*weight) for weight in stored]
    x = torch.randn(1, packed[0].shape[-1])
    room = Packed.empty(1, *stored[0])
    found = {"product": [], "pack": [], "product_as_stored": []}  # type: dict[str, list[float]]
    with torch.inference_mode():
        for weight, ready in zip(stored, packed, strict=True):
            for name, action in (
                ("product", lambda ready=ready: linear(x, ready)),
                ("pack", lambda weight=weight: room.put(0, *weight)),
                ("product_as_stored", lambda weight=weight: linear(x, *weight)),
            ):
                begin = time.perf_counter()
                action()
                found[name].append(3000 * (time.perf_counter() - begin))
    return {name: min(times) for name, times in found.items()}


@contextmanager
def the_release(given: Path | None, experts: int) -> Iterator[Path]:
    """The given folder, or a new one for a while."""
    if given is not None:
        yield given
        return
    config = replace(
        preset("flash"), num_hidden_layers=2, compress_ratios=(4, 128), num_hash_layers=1, num_nextn_predict_layers=0,
        n_routed_experts=experts,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "release"
        write_json(Path(temporary) / "config.json", config.to_dict())
        program = "from abyssal.cli.main import main; main()"
        command = [sys.executable, "-c", program, "make-release", f"{temporary}/config.json", "--seed", "1"]
        subprocess.run([*command, "--layout", "flash", "--out", str(folder)], check=True)
        os.sync()  # else the disk is busy with writing while it is measured
        yield folder


def main() -> None:
    """Make, run, compare, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--limit", default="2GiB")
    parser.add_argument("--release", type=Path, help="one that lies there already; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "streaming.json")
    args = parser.parse_args()
    with the_release(args.release, args.experts) as folder:
        files = sorted(folder.glob("*.safetensors"))
        size = sum(f.stat().st_size for f in files)
        release = Release(folder)
        disk = Disk(files)
        disk.measure()
        decoded = []
        for streams in (1, 4, 1, 4):
            decoded.append(child("decode", folder, parse_bytes(args.limit), streams, args.tokens))
            disk.measure()
        fits, whole = this_machine().memory_available > 1.5 * size, []
        try:
            whole = [child("decode", folder, 0, streams, args.tokens) for streams in (1, 4)] if fits else []
        except MemoryError:  # others took what was free
            fits = False
        rng = random.Random(1)
        ids = [rng.randrange(release.config.vocab_size) for _ in range(64)]
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "logits.npy"
            streamed = child("logits", folder, args.limit, ",".join(map(str, ids)), out)
            disk.measure()
            difference = None
            if fits:
                model = load_model(folder, keep_stored=True).pack()
                with torch.inference_mode():
                    difference = float(np.abs(np.load(out) - model(torch.tensor([ids]))[0].numpy()).max())
                del model
        misses = miss_cost(folder)
    rate, limit, machine = disk.rate, parse_bytes(args.limit), this_machine()
    print(f"release {size / GIB:.2f} GiB, limit {limit / GIB:.2f} GiB; the disk reads {rate / 1e9:.2f} GB/s (O_DIRECT)")
    for run in decoded:
        run["share_of_disk"] = run["bytes_read_per_s"] / rate
        run["peak_of_limit"] = run["peak_bytes"] / limit
        same = next((w for w in whole if w["streams"] == run["streams"]), None)
        run["equal_to_memory"] = same and same["answers"] == run["answers"]
        print(
            f"{run['streams']} at once: {run['tokens_per_s']:.2f} tokens/s, {run['bytes_read_per_s'] / 1e9:.2f} GB/s ="
            f" {100 * run['share_of_disk']:.0f}% of the disk; {100 * run['hit_rate']:.0f}% hits of"
            f" {100 * run['cached_share']:.0f}% cached; peak {run['peak_bytes'] / GIB:.2f} GiB; waited"
            f" {100 * run['waited_share']:.0f}%; equal to memory: {run['equal_to_memory']}"
        )
    for run in whole:
        print(f"in memory, {run['streams']} at once: {run['tokens_per_s']:.2f} tokens/s")
    print(
        f"logits of {len(ids)} tokens: {streamed['seconds']:.1f} s, {streamed['seconds'] / (size / rate):.1f} times a"
        f" plain read of all files; peak {streamed['peak_bytes'] / GIB:.2f} GiB, largest difference {difference}\n"
        f"one expert, ms: product {misses['product']:.2f}, packing {misses['pack']:.2f},"
        f" product as stored {misses['product_as_stored']:.2f}"
    )
    for run in (*decoded, *whole):
        del run["answers"]
    result = {
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "memory": machine.memory_total},
        "torch": torch.__version__,
        "kernels": choice().name,
        "release_bytes": size,
        "experts": args.experts,
        "limit_bytes": limit,
        "disk_bytes_per_s": rate,
        "disk_ways": [{"threads": w[0], "piece": w[1], "bytes_per_s": rates} for w, rates in disk.rates.items()],
        "decode": decoded,
        "in_memory": whole,
        "logits": {"tokens": len(ids), **streamed, "largest_difference_to_memory": difference},
        "miss_ms": misses,
    }
    write_json(args.out, result)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "decode":
        decode(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    elif len(sys.argv) > 1 and sys.argv[1] == "logits":
        logits(Path(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5]))
    else:
        main()
